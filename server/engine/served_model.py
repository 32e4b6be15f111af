"""The served model: one step's forward pass of the frozen base, with K and V in pages.

The tokens of all rows are packed into [1, T] with explicit positions. Knows batches and slots; knows no
tenants, adapter names or queues.
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
from server.engine.prompt_logprobs import PendingScores, PromptScorer, Scored
from server.engine.scheduling.row import Row
from server.kernels import token_blocks as gpu
from server.kernels.cpu.paged_attention import BLOCK, write_pages
from server.kernels.transfers import upload

TIMED_CONTEXT_BLOCKS = 8  # KV blocks that each token of a timed step attends to, at most


class ServedModel(FrozenModel):
    """Weights, KV pages and sites; `forward` runs one step."""

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
        """`exact`: the folder that records which bases have passed the exactness check (exactness_check.py).

        Raises UnsupportedModel for a base that fails it.
        """
        check = ExactnessCheck(exact)
        on_gpu = gpu.uses_triton(placement.device)
        self.decoder: Decoder | None = None  # if the CPU kernels run the layers
        self.step = ForwardContext(gpu=on_gpu)
        # called with each step before it is computed
        self.watch: Callable[[ForwardContext], None] = lambda _step: None
        super().__init__(folder, base_id, placement, self.step, attend, max_context=max_context, check=check)
        self.step.set_pages(KvPages(self.base, placement.device, placement.dtype, kv_bytes))
        if on_gpu:
            fuse_siblings(self.model)
            fuse_norms(self.model)
            fuse_rotary(self.model)
        else:
            self.decoder = install_cpu_layers(self.model, self.step)
        kv_tokens = self.step.pages.count * BLOCK  # a row may fill the whole cache
        self.base = msgspec.structs.replace(self.base, max_context=min(self.base.max_context, kv_tokens))
        self.graphs = DecodeGraphs(self.step, self.run, placement.device, self.base.max_context)
        self.lookahead = Lookahead(self.graphs, self.base.max_context)
        self.scorer = PromptScorer(self.model, self.step, self.base.vocab_size)
        self._scores: PendingScores | None = None  # of the last step, if a row asks for prompt logprobs
        if check.pending:
            self._check(check)

    def install(self, banks: Mapping[str, Bank]) -> None:
        """Set the banks of the adapters that rows may use, by method."""
        self.step.install(banks)

    @torch.inference_mode()
    def forward(self, rows: list[Row]) -> torch.Tensor:
        """Compute the scheduled tokens of each row; float32 logits [completing rows + drafts, vocabulary].

        In the order of `rows`, without those still in prefill after this step. The logits of a row's last
        token come before those of its draft tokens.
        """
        self._scores = None
        precomputed = self.lookahead.logits(rows, self._compute)
        return self._compute(rows) if precomputed is None else precomputed

    def _compute(self, rows: list[Row]) -> torch.Tensor:
        """Logits as `forward` returns them, by a CUDA graph where one fits."""
        if self.step.gpu and (replayed := self.graphs.forward(rows)) is not None:
            return replayed
        return self._forward_packed(rows, [(row, len(row.draft)) for row in rows if row.completes])

    def _forward_packed(self, rows: list[Row], wanted: list[tuple[Row, int]]) -> torch.Tensor:
        """Logits of the last token of each `wanted` row and of so many tokens before it."""
        device = self.placement.device
        ordered = self.step.order(rows)
        ids = [t for row in ordered for t in row.to_compute()]
        positions = [p for row in ordered for p in row.positions()]
        self.step.begin_eager(ordered, device, by_row_length=bool(self.rope_switches))
        last = [(self.step.last_token[row.id], n) for row, n in wanted]
        kept = [at for end, n in last for at in range(end - n, end + 1)]
        self.step.select_logit_rows(rows)
        self.watch(self.step)
        tensors = upload([ids, positions, kept], device)
        scoring = [r for r in ordered if r.command.sampling.prompt_logprobs is not None and r.to_score()]
        if not scoring:
            return self.run(*tensors)
        with self.scorer.capture() as hidden:
            logits = self.run(*tensors)
        self._scores = self.scorer.begin(scoring, hidden[0][0])
        return logits

    def take_scores(self) -> dict[str, Scored]:
        """The prompt logprobs of the step that has just run, by row id."""
        scores, self._scores = self._scores, None
        return scores.read() if scores else {}

    @torch.inference_mode()
    def _check(self, check: ExactnessCheck) -> None:
        """Check that the base is exact. Raises UnsupportedModel. Leaves the pages that it uses zeroed."""

        def compute(rows: list[Row]) -> torch.Tensor:
            return self._forward_packed(rows, [(row, row.scheduled - 1) for row in rows])

        step, blocks = self.step, min(self.step.pages.count, 8)
        if self.decoder:  # programs round what the check of a rounded base wants unrounded
            self.decoder.recorded_steps.off = self.placement.weight_format.rounds
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
        self, ids: torch.Tensor, positions: torch.Tensor, logit_indices: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Run the step that `self.step` describes: float32 logits [R, vocabulary].

        Tokens and positions int64 [T]; `logit_indices` int64 [R], the tokens with logits; None for all.
        """
        self.step.begin_pass()
        output = self.model(
            input_ids=ids[None],
            position_ids=positions[None],
            use_cache=False,
            logits_to_keep=0 if logit_indices is None else logit_indices,
        )
        logits: torch.Tensor = output.logits[0].float()
        return logits

    @property
    def drafts_pay(self) -> bool:
        """On a CPU alone: a step of a few tokens more costs less than another step."""
        return not self.step.gpu and self.placement.device.type == "cpu"

    @torch.inference_mode()
    def time_step(self, block: int, tokens: int) -> float:
        """Seconds of a step of `tokens` decoding rows with some past, the better of two runs.

        It writes to the pages of `block`, which no row may own, reads no other, and leaves them zeroed.
        """
        step, zeros = self.step, torch.zeros(tokens, dtype=torch.int64)
        seen = min(TIMED_CONTEXT_BLOCKS, -(-self.base.max_context // BLOCK))
        step.begin_timing(tokens, [block] * seen)
        times = []
        for _ in range(3):  # the first run records the step
            start = time.perf_counter()
            self.run(zeros, zeros)
            times.append(time.perf_counter() - start)
        for pages in (*step.pages.keys, *step.pages.values):
            pages[block].zero_()
        return min(times[1:])

    def write_virtual_kv(self, row: Row) -> None:
        """Write the precomputed K/V of a row's virtual tokens that no cached block holds, if any."""
        if row.write_virtual_from is not None:
            for use, slot in zip(row.uses, row.slots, strict=True):
                if start := self.step.banks[use.adapter.method].start(slot):
                    self._write_kv(row, start, row.write_virtual_from)
            row.write_virtual_from = None

    def _write_kv(self, row: Row, start: Start, first: int) -> None:
        """Write precomputed K/V of a row's virtual tokens, from `first` on, to its pages."""
        count = start.keys.shape[1]
        positions = kv_positions(row.blocks, first, count, self.placement.device)
        for layer in range(self.base.layers):
            pages = (self.step.pages.keys[layer], self.step.pages.values[layer])
            write_pages(*pages, start.keys[layer, first:], start.values[layer, first:], positions)

    def end_tokens(self) -> frozenset[int]:
        """The end-of-text ids of the model's generation config."""
        ids = self.model.generation_config.eos_token_id
        return frozenset([ids] if isinstance(ids, int) else ids or ())
