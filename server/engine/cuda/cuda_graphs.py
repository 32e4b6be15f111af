"""Decode steps as CUDA graphs: recorded once for so many rows and what their adapters touch, then replayed.

A step of Python and a thousand launches takes longer than an 8B model's weights take to be read; a replay is
one call. What differs from step to step lies in tables at fixed addresses, which one copy fills (and a second
brings tokens that the host does not know yet). Recorded are steps in which all rows decode and every adapter
can be (`Bank.recorded_sites`); all others run as they come.

A step is recorded when its like has come AFTER times, which takes a few tenths of a second. Of the recorded
steps that hold all that a batch needs, the one that holds least besides is replayed: launches for sites that
nobody touches end at once, but they are not free. One for rows of the base alone holds no adapters at all.
"""

import logging
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from server.adapters.methods.interface import Bank, RecordedSites
from server.adapters.methods.token_spans import TokenSpans
from server.engine.model.batch_tables import GpuBatch, place_of
from server.engine.model.forward_context import ForwardContext
from server.engine.scheduling.row import Row
from server.kernels.cpu.paged_attention import BLOCK
from server.kernels.token_blocks import FIELDS, SMALL_BLOCK, BlockPlan, put_in_blocks, round_up

log = logging.getLogger(__name__)

AFTER = 3
MOST = 64  # recorded steps that are kept; the one longest unused goes

Call = Callable[[], torch.Tensor]


class Recorded(NamedTuple):
    """`replay` runs the step again, on what the tables hold then; its result is written into `output`."""

    replay: Callable[[], object]
    output: torch.Tensor


class CudaRecorder:
    """All graphs share one pool of memory: they run one after the other, and only outputs stay."""

    def __init__(self) -> None:
        self.pool: Any = None

    def __call__(self, call: Call) -> Recorded:
        """Twice to warm up, so that kernels are compiled and libraries have their memory; then as a graph."""
        stream: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            call()
            call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # thread_local: the loader's threads may allocate meanwhile
        with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
            output = call()
        self.pool = graph.pool()
        return Recorded(graph.replay, output)


@dataclass
class PinnedBuffer:
    host: torch.Tensor
    parts: "list[np.ndarray[Any, Any]]"  # views of it
    held: list[tuple[list[int], int]]  # by row: the block list that was written, and how much of it
    copied: Any = None  # a CUDA event

    def hold(self, table: "np.ndarray[Any, Any]", i: int, blocks: list[int]) -> None:
        """A running row's list only grows: what was written of the same list stays."""
        before, count = self.held[i]
        first = count if before is blocks and count <= len(blocks) else 0
        table[first : len(blocks)] = blocks[first:]
        self.held[i] = (blocks, len(blocks))


class Tables:
    """What a step of up to `rows` rows reads, at fixed addresses; filled by one copy from pinned memory.

    | ids | positions | lengths | places | order and blocks of each bank | block tables |

    Of pinned memory there are two halves that take turns, so that the copy before may still be under way.
    """

    def __init__(self, rows: int, banks: int, most: int, device: torch.device) -> None:
        self.rows = rows
        small = rows * (4 + banks * (1 + FIELDS))
        size, pinned = small + rows * most, device.type == "cuda"
        self.device = torch.zeros(size, dtype=torch.int64, device=device)
        self.there = self._split(self.device, banks, most)
        self.there[3][:] = -1  # a step that is being recorded writes nowhere
        hosts = [torch.zeros(size, dtype=torch.int64, pin_memory=pinned) for _ in range(2)]
        self.halves = [
            PinnedBuffer(host, [part.numpy() for part in self._split(host, banks, most)], [([], 0)] * rows)
            for host in hosts
        ]

    def _split(self, flat: torch.Tensor, banks: int, most: int) -> list[torch.Tensor]:
        sizes = [self.rows] * 4 + [self.rows, self.rows * FIELDS] * banks + [self.rows * most]
        parts = list(torch.split(flat, sizes))
        return [*parts[:-1], parts[-1].view(self.rows, most)]

    def fill(
        self,
        rows: list[Row],
        at: list[int],
        tokens: list[int] | torch.Tensor,
        spans: list[list[tuple[int, int, int]]],
    ) -> None:
        """Rows that decode, each with the token at this place of it, which may be known to the device alone;
        and of each bank who uses which slot.
        """
        n = len(rows)
        half, other = self.halves
        self.halves = [other, half]
        if half.copied:
            half.copied.synchronize()  # long over, unless copies of adapters hold it up
        ids, positions, lengths, places, *plans, blocks = half.parts
        ids[:n] = 0 if isinstance(tokens, torch.Tensor) else tokens
        positions[:n] = at
        lengths[:n] = positions[:n] + 1
        places[:n] = [place_of(row, own) for row, own in zip(rows, at, strict=True)]
        ids[n:] = positions[n:] = lengths[n:] = 0
        places[n:] = -1
        for i, own in enumerate(spans):
            for table, values in zip(plans[2 * i : 2 * i + 2], put_in_blocks(own, SMALL_BLOCK), strict=True):
                table[: len(values)] = values
                table[len(values) :] = 0
        for i, row in enumerate(rows):
            half.hold(blocks[i], i, row.blocks)
        self.device.copy_(half.host, non_blocking=True)
        if self.device.is_cuda:
            half.copied = half.copied or torch.cuda.Event()  # type: ignore[no-untyped-call]
            half.copied.record()
        if isinstance(tokens, torch.Tensor):
            self.there[0][:n].copy_(tokens)


@dataclass(frozen=True)
class GraphSignature:
    """What a recorded step can serve: this many rows, and of each bank these sites and ranks."""

    rows: int
    traces: tuple[tuple[Bank, RecordedSites], ...]

    def holds(self, need: "GraphSignature") -> bool:
        own = dict(self.traces)
        return (
            self.rows == need.rows
            and own.keys() == dict(need.traces).keys()
            and all(
                trace.mask & ~own[bank].mask == 0 and trace.ranks <= own[bank].ranks
                for bank, trace in need.traces
            )
        )

    @property
    def size(self) -> int:
        return sum(trace.mask.bit_count() * trace.ranks for _, trace in self.traces)


class DecodeGraphs:
    """Recorded decode steps. `run(ids, positions)` computes the step that is set."""

    def __init__(
        self,
        step: ForwardContext,
        run: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
        device: torch.device,
        max_context: int,
    ) -> None:
        self.step, self.run, self.device = step, run, device
        self.record: Callable[[Call], Recorded] = CudaRecorder()
        self.most = -(-max_context // BLOCK)
        self.seen: Counter[GraphSignature] = Counter()
        self.recorded: OrderedDict[GraphSignature, tuple[Recorded, Tables]] = OrderedDict()
        self.off = False
        self.replays = 0

    def forward(self, rows: list[Row]) -> torch.Tensor | None:
        """Logits [rows, vocabulary], good until the next replay; None if this step is not recorded."""
        if not all(row.scheduled == 1 and row.completes and row.computed >= row.virtual for row in rows):
            return None  # some are in prefill
        need = None if self.off else self.variant(rows)
        if need is None:
            return None
        best = self._best(need)
        if best is None:
            if len(self.seen) > 16 * MOST:
                self.seen.clear()
            self.seen[need] += 1
            if self.seen[need] < AFTER or not self._record(need):
                return None
            best = need
        at = [row.computed for row in rows]
        return self._replay(best, rows, at, [row.tokens[n] for row, n in zip(rows, at, strict=True)])

    def go_on(self, rows: list[Row], at: list[int], tokens: torch.Tensor) -> torch.Tensor | None:
        """The same for rows that get these tokens, int64 [rows] on the device, at these places."""
        need = None if self.off else self.variant(rows)
        best = need and self._best(need)
        return self._replay(best, rows, at, tokens) if best else None

    def _best(self, need: GraphSignature) -> GraphSignature | None:
        """Of the recorded ones."""
        fitting = (variant for variant in self.recorded if variant.holds(need))
        return min(fitting, key=lambda variant: variant.size, default=None)

    def _replay(
        self, variant: GraphSignature, rows: list[Row], at: list[int], tokens: list[int] | torch.Tensor
    ) -> torch.Tensor:
        self.recorded.move_to_end(variant)
        recorded, tables = self.recorded[variant]
        tables.fill(rows, at, tokens, [self._spans(rows, bank) for bank, _ in variant.traces])
        recorded.replay()
        self.replays += 1
        return recorded.output[: len(rows)]

    def variant(self, rows: list[Row]) -> GraphSignature | None:
        """What these rows need to decode; None if some have adapters that take Python."""
        needs: dict[Bank, RecordedSites] = {}
        for row in rows:
            acting = 0
            for use, slot in zip(row.uses, row.slots, strict=True):
                bank = self.step.banks[use.adapter.method]
                trace = bank.recorded_sites(slot)
                if trace is None or use.weight != 1:
                    return None
                if trace.mask:
                    acting += 1
                    other = needs.get(bank, RecordedSites())
                    needs[bank] = RecordedSites(trace.mask | other.mask, max(trace.ranks, other.ranks))
            if acting > 1:
                return None
        bucket = 1 << (len(rows) - 1).bit_length()
        found = {bank: RecordedSites(trace.mask, round_up(trace.ranks)) for bank, trace in needs.items()}
        return GraphSignature(bucket, tuple(sorted(found.items(), key=lambda pair: id(pair[0]))))

    def _spans(self, rows: list[Row], bank: Bank) -> list[tuple[int, int, int]]:
        return [
            (slot, i, i + 1)
            for i, row in enumerate(rows)
            for use, slot in zip(row.uses, row.slots, strict=True)
            if self.step.banks[use.adapter.method] is bank and bank.recorded_sites(slot) != RecordedSites()
        ]

    def _record(self, variant: GraphSignature) -> bool:
        """False if this model cannot be recorded; then nothing ever is."""
        tables = Tables(variant.rows, len(variant.traces), self.most, self.device)
        try:
            recorded = self.record(lambda: self._run(variant, tables))
        except RuntimeError as error:  # an operator of this model's waits for the device, say
            log.warning("decode steps are not recorded as CUDA graphs: %s", error)
            self.off = True
            return False
        if len(self.recorded) >= MOST:
            self.recorded.popitem(last=False)
        self.recorded[variant] = (recorded, tables)
        del self.seen[variant]
        return True

    def _run(self, variant: GraphSignature, tables: Tables) -> torch.Tensor:
        """The step that these tables tell of; whatever step was set before is forgotten."""
        ids, positions, lengths, places, *plans, blocks = tables.there
        step = self.step
        step.batch = GpuBatch(places, lengths, blocks, blocks.new_empty(0, 4))
        step.in_place, step.chunks, step.last, step.row_lengths = variant.rows, [], {}, None
        acting: list[tuple[Bank, TokenSpans]] = []
        for i, (bank, trace) in enumerate(variant.traces):
            plan = BlockPlan(plans[2 * i], plans[2 * i + 1].view(-1, FIELDS), SMALL_BLOCK, trace.ranks)
            acting.append((bank, TokenSpans.of_graph(plan, bank.touched(trace), variant.rows)))
        step.affine, step.inputs, step.norm, step.sublayer = (
            [(bank, rows) for bank, rows in acting if bank.acts(hook, ())]
            for hook in ("affine", "inputs", "norm", "sublayer")
        )
        step.head, step.head_inputs, step.head_norm = step.affine, step.inputs, step.norm
        return self.run(ids, positions)
