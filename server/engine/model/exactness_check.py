"""Whether the base comes out of our steps as it does out of transformers' own classes; asked at start.

Two rows go through the model as transformers has it, each alone and whole; then through steps as they will
serve, packed and in chunks. The longer row passes a window and a block, and its second half stands at the end
of the context. A base whose logits differ is refused. Nothing need be known of a class for this: what it does
with masks, positions, scalings or state of its own shows in its logits.

A yes is kept in the data directory: for the same weights, layout, code and versions it is not asked again.
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
from server.engine.model.module_tokens import logits_of, own_attention, refusing
from server.engine.scheduling.row import Row
from server.errors import UnsupportedModel
from server.kernels.cpu.int8.linear import without_rounding
from server.kernels.cpu.paged_attention import BLOCK, AttentionOptions
from server.messages import Generate, Sampling

# Norm of the difference over the norm of transformers' logits. The order of sums alone makes up to 2e-4 in
# float32 and a hundredth in bfloat16; what is computed otherwise makes tenths.
TOLERANCES = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 5e-2}
SHORT = 9  # tokens of the shorter row
MAX_WINDOW = (
    64  # wider ones are made this narrow meanwhile, on both sides, so that the longer row stays short
)


class HasScores(Protocol):
    """A layer as kernels of ours run it."""

    scores: AttentionOptions


Compute = Callable[[list[Row]], torch.Tensor]  # float32 logits [all scheduled tokens, vocabulary], row by row


@dataclass(eq=False)
class CheckRow(Row):
    """A row whose tokens stand at these positions."""

    places: Sequence[int] = ()

    @property
    def length(self) -> int:
        return self.places[-1] + 1

    def positions(self) -> Sequence[int]:
        return self.places[self.computed : self.computed + self.scheduled]


class ExactnessCheck:
    """Of one base: `reference` before its linears are packed, `compare` once it can serve."""

    def __init__(self, folder: Path | None = None) -> None:
        """`folder`: where answers are kept; None: it is asked each time."""
        self._folder = folder
        self._answer = ""
        self._places: list[list[int]] = []  # of each row
        self._expected: list[torch.Tensor] = []  # of each row, float32 [tokens, vocabulary]

    @property
    def pending(self) -> bool:
        return bool(self._expected)

    def reference(
        self, model: Any, originals: Mapping[str, nn.Module], identity: str, layout: str, context: int
    ) -> None:
        """What transformers makes of the rows; `originals` stood where `model` has sites now."""
        self._answer = _fingerprint(model, identity, layout, context)
        if self._folder and (self._folder / self._answer).exists():
            return
        with _narrow_windows(model) as window:
            self._places = _places(max(window, BLOCK) + 2 * BLOCK + 1, context)
            sites = {name: model.get_submodule(name) for name in originals}
            put_modules(model, originals)
            self._expected = self._by_transformers(model)
            put_modules(model, sites)
            if layout != "float32":  # what is rounded is compared with itself, so sites are compared here
                found = self._by_transformers(model)
                _compare(found, self._expected, model.dtype, "with sites in the place of its linears")

    def rounded_reference(self, model: Any) -> None:
        """The same of a base whose linears have been rounded."""
        if self.pending:
            with _narrow_windows(model), without_rounding():
                self._expected = self._by_transformers(model)

    def compare(
        self, model: Any, compute: Compute, blocks: int, what: str, layers: Sequence[HasScores] = ()
    ) -> None:
        """Raises UnsupportedModel if steps give other logits. Writes into the first `blocks` pages.

        `layers`: those of `model`, where kernels of ours run them.
        """
        with _narrow_windows(model, layers), without_rounding(), refusing("a packed step fails"):
            found = _by_steps(compute, self._rows(model.config.vocab_size, blocks))
        _compare(found, self._expected, model.dtype, what)

    def keep(self) -> None:
        """It is exact. Where the answer cannot be written, the next start asks again."""
        self._expected = []
        if self._folder:
            with suppress(OSError):
                self._folder.mkdir(parents=True, exist_ok=True)
                (self._folder / self._answer).touch()

    def _by_transformers(self, model: Any) -> list[torch.Tensor]:
        device = next(model.parameters()).device
        with own_attention(model), torch.inference_mode(), refusing("its own class fails"):
            found = []
            for places in self._places:
                ids = torch.tensor(_tokens(places, model.config.vocab_size), device=device)
                counted = places == [*range(len(places))]  # a class may count from another number than 0
                positions = None if counted else torch.tensor(places, device=device)
                found.append(logits_of(model, ids, positions))
        if not all(logits.isfinite().all() for logits in found):
            raise UnsupportedModel("transformers' own logits are not finite")
        return found

    def _rows(self, vocabulary: int, blocks: int) -> list[Row]:
        """The longer one is cut where there are fewer blocks: those before see nothing of that."""
        rows: list[Row] = []
        for i, places in enumerate(self._places):
            tokens = _tokens(places, vocabulary)[: (blocks - 1) * BLOCK]
            command = Generate(f"check-{i}", "", tokens, Sampling(max_tokens=1))
            row = CheckRow(command, 0, tokens=tokens, prompt_length=len(tokens), places=places)
            row.blocks = [0] if i else [*range(1, 1 + -(-len(tokens) // BLOCK))]
            rows.append(row)
        return rows


def _by_steps(compute: Compute, rows: list[Row]) -> list[torch.Tensor]:
    """In two chunks, then the last token: logits of each row, [tokens, vocabulary]."""
    found: list[list[torch.Tensor]] = [[] for _ in rows]
    for part in range(3):
        for row in rows:
            last = len(row.tokens) - 1
            end = (last // 2, last, last + 1)[part]
            row.scheduled = end - row.computed
        logits = compute(rows)
        for own, piece in zip(found, torch.split(logits, [row.scheduled for row in rows]), strict=True):
            own.append(piece.clone())
        for row in rows:
            row.computed += row.scheduled
    return [torch.cat(own) for own in found]


def _compare(found: list[torch.Tensor], expected: list[torch.Tensor], dtype: torch.dtype, what: str) -> None:
    for logits, whole in zip(found, expected, strict=True):
        reference = whole[: len(logits)]
        error = float((logits - reference).norm() / reference.norm())
        if not error <= TOLERANCES[dtype]:  # NaN is not
            raise UnsupportedModel(
                f"{what}, its logits are {error:.1e} of their size away from those of transformers' attention"
            )


def _places(count: int, context: int) -> list[list[int]]:
    """Positions of the longer row, half of them at the end of the context, and of the shorter."""
    count = min(count, context)
    half = count // 2
    return [[*range(half), *range(context - count + half, context)], [*range(min(SHORT, context))]]


def _tokens(places: Sequence[int], vocabulary: int) -> list[int]:
    return [(17 * i + len(places)) % vocabulary for i in range(len(places))]


@contextmanager
def _narrow_windows(model: Any, layers: Sequence[HasScores] = ()) -> Iterator[int]:
    """Sliding windows of at most MAX_WINDOW meanwhile; gives the smallest, 0 if there is none."""
    configs = [model.config, model.config.get_text_config()]
    owners = [
        owner
        for owner in {id(owner): owner for owner in [*configs, *model.modules()]}.values()
        if isinstance(getattr(owner, "sliding_window", None), int)
    ]
    widths = [owner.sliding_window for owner in owners]
    scores = [layer.scores for layer in layers]
    try:
        for layer in layers:
            layer.scores = replace(layer.scores, window=min(layer.scores.window, MAX_WINDOW))
        for owner, width in zip(owners, widths, strict=True):
            owner.sliding_window = min(width, MAX_WINDOW)
        yield min((min(width, MAX_WINDOW) for width in widths if width), default=0)
    finally:
        for owner, width in zip(owners, widths, strict=True):
            owner.sliding_window = width
        for layer, own in zip(layers, scores, strict=True):
            layer.scores = own


def _fingerprint(model: Any, identity: str, layout: str, context: int) -> str:
    """Of all that an answer depends on."""
    root = Path(__file__).parents[2]
    total = hashlib.sha256()
    for path in sorted(path for part in ("engine", "kernels") for path in (root / part).rglob("*.py")):
        total.update(path.read_bytes())
    parameter = next(model.parameters())
    facts = (
        model.config.to_json_string(use_diff=False),
        identity,
        layout,
        str(context),
        str(parameter.dtype),
        str(parameter.device.type),
        torch.backends.cpu.get_cpu_capability(),
        *(version(name) for name in ("torch", "transformers")),
    )
    total.update("\0".join(facts).encode())
    return total.hexdigest()
