"""The base model at work: one step's tokens through the frozen base, K and V in pages.

Tokens of all rows are packed [1, T] with explicit positions. Knows batches and slots; knows no tenants,
names or queues.
"""

import time
from collections.abc import Callable, Mapping
from pathlib import Path

import msgspec
import torch

from server.adapters.methods.interface import Bank, Start
from server.engine.cpu.decoder_layers import Decoder, install_cpu_layers
from server.engine.cuda.cuda_graphs import DecodeGraphs
from server.engine.cuda.fused_modules import fuse_norms, fuse_rotary, fuse_siblings
from server.engine.cuda.lookahead import Lookahead
from server.engine.model.attention import attend
from server.engine.model.base_model import FrozenModel, Placement
from server.engine.model.exactness_check import ExactnessCheck
from server.engine.model.forward_context import MAX_IN_PLACE_PAIRS, ForwardContext
from server.engine.model.kv_pages import KvPages, kv_positions
from server.engine.scheduling.row import Row
from server.engine.scheduling.step_cost import StepCost
from server.kernels import token_blocks as gpu
from server.kernels.cpu.paged_attention import BLOCK, write_pages
from server.kernels.transfers import upload

SEEN = 8  # blocks of a row whose step is timed, at most


class ServedModel(FrozenModel):
    """Weights, pages and sites; `forward` runs one step."""

    def __init__(
        self,
        folder: Path,
        base_id: str,
        placement: Placement,
        *,
        kv_bytes: int,
        max_context: int,
        exact: Path | None = None,
    ) -> None:
        """`exact`: where it is kept that a base has been found to be exact (exactness_check.py).

        Raises UnsupportedModel for one that is not.
        """
        check = ExactnessCheck(exact)
        on_gpu = gpu.uses_triton(placement.device)
        self.decoder: Decoder | None = None  # where kernels of ours run the layers
        self.step = ForwardContext(gpu=on_gpu)
        self.watch: Callable[[ForwardContext], None] = lambda _step: (
            None
        )  # sees each step before it is computed
        super().__init__(folder, base_id, placement, self.step, attend, max_context=max_context, check=check)
        self.step.set_pages(KvPages(self.base, placement.device, placement.dtype, kv_bytes))
        if on_gpu:
            fuse_siblings(self.model)
            fuse_norms(self.model)
            fuse_rotary(self.model)
        else:
            self.decoder = install_cpu_layers(self.model, self.step)
        holds = self.step.pages.count * BLOCK  # one row may fill the whole cache, and no more
        self.base = msgspec.structs.replace(self.base, max_context=min(self.base.max_context, holds))
        self.graphs = DecodeGraphs(self.step, self.run, placement.device, self.base.max_context)
        self.ahead = Lookahead(self.graphs, self.base.max_context)
        if check.pending:
            self._check(check)

    def install(self, banks: Mapping[str, Bank]) -> None:
        """The banks whose adapters rows may name, by method."""
        self.step.install(banks)

    @torch.inference_mode()
    def forward(self, rows: list[Row]) -> torch.Tensor:
        """Compute each row's scheduled tokens; float32 logits [rows that complete and guesses, vocabulary].

        The logits' order is that of `rows`, less those still in prefill after this step; a row's own come
        before those of its guesses.
        """
        ahead = self.ahead.logits(rows, self._compute)
        return self._compute(rows) if ahead is None else ahead

    def _compute(self, rows: list[Row]) -> torch.Tensor:
        if self.step.gpu and (replayed := self.graphs.forward(rows)) is not None:
            return replayed
        return self._packed(rows, [(row, len(row.guess)) for row in rows if row.completes])

    def _packed(self, rows: list[Row], wanted: list[tuple[Row, int]]) -> torch.Tensor:
        """Logits of these rows' last tokens, and of so many before."""
        device = self.placement.device
        ordered = self.step.order(rows)
        ids = [t for row in ordered for t in row.to_compute()]
        positions = [p for row in ordered for p in row.positions()]
        self.step.begin_eager(ordered, device, by_row_length=bool(self.rope_switches))
        last = [(self.step.last_token[row.id], n) for row, n in wanted]
        kept = [at for end, n in last for at in range(end - n, end + 1)]
        self.step.select_logit_rows(rows)
        self.watch(self.step)
        return self.run(*upload([ids, positions, kept], device))

    @torch.inference_mode()
    def _check(self, check: ExactnessCheck) -> None:
        """Raises UnsupportedModel. Before any row runs: leaves the first pages zeroed."""

        def compute(rows: list[Row]) -> torch.Tensor:
            return self._packed(rows, [(row, row.scheduled - 1) for row in rows])

        step, blocks = self.step, min(self.step.pages.count, 8)
        if self.decoder:  # programs round what the check of a rounded base wants unrounded
            self.decoder.recorded_steps.off = self.base.layout != "float32"
        for pairs, what in (
            (MAX_IN_PLACE_PAIRS, "packed beside another row"),
            (0, "packed, with a past that is gathered"),
        ):
            step.limit_in_place(pairs)
            check.compare(self.model, compute, blocks, what, self.decoder.layers if self.decoder else ())
        step.limit_in_place()
        if self.decoder:
            self.decoder.recorded_steps.off = False
            self.decoder.recorded_steps.clear()
        for pages in (*step.pages.keys, *step.pages.values):
            pages[:blocks].zero_()
        check.record_success()

    def run(
        self, ids: torch.Tensor, positions: torch.Tensor, kept: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The step that is set, for tokens int64 [T]: float32 logits [kept, vocabulary]; None keeps all."""
        self.step.begin_pass()
        output = self.model(
            input_ids=ids[None],
            position_ids=positions[None],
            use_cache=False,
            logits_to_keep=0 if kept is None else kept,
        )
        logits: torch.Tensor = output.logits[0].float()
        return logits

    def costs(self) -> StepCost | None:
        """What steps take, where guessed tokens may save some; on a GPU nothing is guessed."""
        return None if self.step.gpu or self.placement.device.type != "cpu" else StepCost.timed(self.seconds)

    @torch.inference_mode()
    def seconds(self, tokens: int) -> float:
        """What a step of so many tokens takes, the better of two, if each sees some others. Before any row
        runs: it writes to the first page, reads nothing else, and leaves that zeroed.
        """
        step, zeros = self.step, torch.zeros(tokens, dtype=torch.int64)
        seen = min(SEEN, -(-self.base.max_context // BLOCK))
        step.begin_timing(tokens, seen)
        times = []
        for _ in range(3):  # the first records it
            start = time.perf_counter()
            self.run(zeros, zeros)
            times.append(time.perf_counter() - start)
        for pages in (*step.pages.keys, *step.pages.values):
            pages[0].zero_()
        return min(times[1:])

    def fill(self, row: Row) -> None:
        """Write the given K/V of a row's virtual tokens that no cached block held, if there are any."""
        if row.fill is not None:
            for use, slot in zip(row.uses, row.slots, strict=True):
                if start := self.step.banks[use.adapter.method].start(slot):
                    self.write(row, start, row.fill)
            row.fill = None

    def write(self, row: Row, start: Start, first: int) -> None:
        """Put the given K/V of a row's virtual tokens, from `first` on, into its pages."""
        count = start.keys.shape[1]
        positions = kv_positions(row.blocks, first, count, self.placement.device)
        for layer in range(self.base.layers):
            pages = (self.step.pages.keys[layer], self.step.pages.values[layer])
            write_pages(*pages, start.keys[layer, first:], start.values[layer, first:], positions)

    def end_tokens(self) -> frozenset[int]:
        """Ids after which a text is over, as the model's own generation config says."""
        ids = self.model.generation_config.eos_token_id
        return frozenset([ids] if isinstance(ids, int) else ids or ())
