"""At start, check that the base has the same logits in our steps as in transformers' own classes.

Two rows run through transformers' own model, each alone and in one piece; then through our steps, packed and
in chunks. The longer row is longer than a window and a block, and its second half has the last positions of
the context. A base whose logits differ is refused. The check needs no knowledge of the class: whatever that
does with masks, positions, scalings or state of its own shows in its logits.

Success is recorded in the data directory: the same weights, weight format, code and versions are checked
once.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from server.engine.model.linear_sites import put_modules
from server.engine.model.module_tokens import as_unsupported, eager_attention, logits_of
from server.engine.scheduling.row import Row
from server.errors import UnsupportedModel
from server.kernels.cpu.packed_linear import without_rounding
from server.kernels.cpu.paged_attention import BLOCK, AttentionOptions
from server.kernels.weight_formats import WeightFormat
from server.messages import Generate, Sampling

# Norm of the difference over the norm of transformers' logits. Another order of sums alone makes up to 2e-4
# in float32 and 1e-2 in bfloat16; another formula makes tenths.
TOLERANCES = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 5e-2}
CODE = ("base_model", "engine", "kernels")  # folders of server/ that the result depends on
SHORT_ROW = 9  # tokens of the shorter row
# Wider windows are narrowed to this during the check, in both models, so that the longer row stays short.
MAX_WINDOW = 64


class HasAttentionOptions(Protocol):
    """A layer that our kernels run."""

    options: AttentionOptions


Compute = Callable[[list[Row]], torch.Tensor]  # float32 logits [all scheduled tokens, vocabulary], row by row


@dataclass(eq=False)
class CheckRow(Row):
    """A row whose tokens have the given positions."""

    all_positions: Sequence[int] = ()

    @property
    def length(self) -> int:
        return self.all_positions[-1] + 1

    def positions(self) -> Sequence[int]:
        return self.all_positions[self.computed : self.computed + self.scheduled]


class ExactnessCheck:
    """The check of one base: `take_reference` before its linears are packed, `compare` once it can serve,
    `record_success` if that raised nothing.
    """

    def __init__(self, folder: Path | None = None) -> None:
        """`folder`: where success is recorded; None: the check is made at every start."""
        self._folder = folder
        self._fingerprint = ""
        self._positions: list[list[int]] = []  # of each row's tokens
        self._expected: list[torch.Tensor] = []  # of each row, float32 [tokens, vocabulary]

    @property
    def pending(self) -> bool:
        """Whether there are reference logits that steps have yet to be compared with."""
        return bool(self._expected)

    def take_reference(
        self,
        model: Any,
        originals: Mapping[str, nn.Module],
        identity: str,
        weight_format: WeightFormat,
        context: int,
    ) -> None:
        """Compute the rows by transformers, unless success is on record.

        `originals`: the modules that sites replaced in `model`, by path. `context`: tokens of the longest
        row. Raises UnsupportedModel.
        """
        self._fingerprint = _fingerprint(model, identity, weight_format.name, context)
        if self._folder and (self._folder / self._fingerprint).exists():
            return
        with _narrow_windows(model) as window:
            self._positions = _row_positions(max(window, BLOCK) + 2 * BLOCK + 1, context)
            sites = {name: model.get_submodule(name) for name in originals}
            put_modules(model, originals)
            self._expected = self._by_transformers(model)
            put_modules(model, sites)
            if weight_format.rounds:  # steps are compared with the rounded model, so check sites here
                logits = self._by_transformers(model)
                _compare(logits, self._expected, model.dtype, "with sites in the place of its linears")

    def take_rounded_reference(self, model: Any) -> None:
        """Compute the rows again by transformers, after the linears' weights have been rounded."""
        if self.pending:
            with _narrow_windows(model), without_rounding():
                self._expected = self._by_transformers(model)

    def compare(
        self, model: Any, compute: Compute, blocks: int, what: str, layers: Sequence[HasAttentionOptions] = ()
    ) -> None:
        """Compute the rows by steps, which write into the first `blocks` pages.

        `layers`: the layers of `model`, where our kernels run them. `what`: how the steps differ, for the
        error. Raises UnsupportedModel if the logits differ from the reference.
        """
        with _narrow_windows(model, layers), without_rounding(), as_unsupported("a packed step fails"):
            logits = _by_steps(compute, self._rows(model.config.vocab_size, blocks))
        _compare(logits, self._expected, model.dtype, what)

    def record_success(self) -> None:
        """Record that the base is exact. If the file cannot be written, the next start checks again."""
        self._expected = []
        if self._folder:
            with suppress(OSError):
                self._folder.mkdir(parents=True, exist_ok=True)
                (self._folder / self._fingerprint).touch()

    def _by_transformers(self, model: Any) -> list[torch.Tensor]:
        device = next(model.parameters()).device
        with eager_attention(model), torch.inference_mode(), as_unsupported("its own class fails"):
            all_logits = []
            for row_positions in self._positions:
                ids = torch.tensor(_tokens(row_positions, model.config.vocab_size), device=device)
                # positions 0, 1, ... are left to the class, which may count from another number
                counted = row_positions == [*range(len(row_positions))]
                positions = None if counted else torch.tensor(row_positions, device=device)
                all_logits.append(logits_of(model, ids, positions))
        if not all(logits.isfinite().all() for logits in all_logits):
            raise UnsupportedModel("transformers' own logits are not finite")
        return all_logits

    def _rows(self, vocabulary: int, blocks: int) -> list[Row]:
        """The longer row is cut to the blocks there are; earlier tokens do not see the tokens cut off."""
        rows: list[Row] = []
        for i, positions in enumerate(self._positions):
            tokens = _tokens(positions, vocabulary)[: (blocks - 1) * BLOCK]
            command = Generate(f"check-{i}", "", tokens, Sampling(max_tokens=1))
            row = CheckRow(command, 0, tokens=tokens, prompt_length=len(tokens), all_positions=positions)
            row.blocks = [0] if i else [*range(1, 1 + -(-len(tokens) // BLOCK))]
            rows.append(row)
        return rows


def _by_steps(compute: Compute, rows: list[Row]) -> list[torch.Tensor]:
    """Logits [tokens, vocabulary] of each row, computed in two chunks and then the last token."""
    by_row: list[list[torch.Tensor]] = [[] for _ in rows]
    for part in range(3):
        for row in rows:
            last = len(row.tokens) - 1
            end = (last // 2, last, last + 1)[part]
            row.scheduled = end - row.computed
        logits = compute(rows)
        for pieces, piece in zip(by_row, torch.split(logits, [row.scheduled for row in rows]), strict=True):
            pieces.append(piece.clone())
        for row in rows:
            row.computed += row.scheduled
    return [torch.cat(pieces) for pieces in by_row]


def _compare(
    all_logits: list[torch.Tensor], expected: list[torch.Tensor], dtype: torch.dtype, what: str
) -> None:
    for logits, uncut in zip(all_logits, expected, strict=True):
        reference = uncut[: len(logits)]
        error = float((logits - reference).norm() / reference.norm())
        if not error <= TOLERANCES[dtype]:  # also if it is NaN
            raise UnsupportedModel(
                f"{what}, its logits are {error:.1e} of their size away from those of transformers' attention"
            )


def _row_positions(count: int, context: int) -> list[list[int]]:
    """Positions of the longer row's `count` tokens, half of them at the end of the context, and the
    shorter's.
    """
    count = min(count, context)
    half = count // 2
    return [[*range(half), *range(context - count + half, context)], [*range(min(SHORT_ROW, context))]]


def _tokens(positions: Sequence[int], vocabulary: int) -> list[int]:
    return [(17 * i + len(positions)) % vocabulary for i in range(len(positions))]


@contextmanager
def _narrow_windows(model: Any, layers: Sequence[HasAttentionOptions] = ()) -> Iterator[int]:
    """Inside, sliding windows have at most MAX_WINDOW tokens. Yields the smallest; 0 if there is none."""
    configs = [model.config, model.config.get_text_config()]
    owners = [
        owner
        for owner in {id(owner): owner for owner in [*configs, *model.modules()]}.values()
        if isinstance(getattr(owner, "sliding_window", None), int)
    ]
    widths = [owner.sliding_window for owner in owners]
    options = [layer.options for layer in layers]
    try:
        for layer in layers:
            layer.options = replace(layer.options, window=min(layer.options.window, MAX_WINDOW))
        for owner, width in zip(owners, widths, strict=True):
            owner.sliding_window = min(width, MAX_WINDOW)
        yield min((min(width, MAX_WINDOW) for width in widths if width), default=0)
    finally:
        for owner, width in zip(owners, widths, strict=True):
            owner.sliding_window = width
        for layer, before in zip(layers, options, strict=True):
            layer.options = before


def _fingerprint(model: Any, identity: str, weight_format: str, context: int) -> str:
    """SHA-256 of everything the result depends on."""
    root = Path(__file__).parents[2]
    total = hashlib.sha256()
    for path in sorted(path for part in CODE for path in (root / part).rglob("*.py")):
        total.update(path.read_bytes())
    parameter = next(model.parameters())
    facts = (
        model.config.to_json_string(use_diff=False),
        identity,
        weight_format,
        str(context),
        str(parameter.dtype),
        str(parameter.device.type),
        torch.backends.cpu.get_cpu_capability(),
        *(version(name) for name in ("torch", "transformers")),
    )
    total.update("\0".join(facts).encode())
    return total.hexdigest()
