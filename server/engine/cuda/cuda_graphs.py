"""Decode steps as CUDA graphs: recorded once for a number of rows and the sites their adapters touch,
replayed.

Python and a thousand launches take longer than the GPU needs to read the weights of an 8B model; a replay is
one call. Whatever differs from step to step lies in tables at fixed addresses, which one copy fills (a second
copy brings tokens that the host does not know yet). A step can be recorded if all its rows decode and all its
adapters support it (`Bank.recorded_sites`); all others run eagerly.

A step is recorded, in a few tenths of a second, when its signature occurs for the RECORD_AFTER-th time. Of
the graphs that cover a batch the cheapest is replayed: launches for sites that no adapter touches end at
once, but they are not free. A graph for rows of the base alone has no adapter launches at all.
"""

import logging
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from server.adapters.methods.interface import Bank, RecordedSites
from server.adapters.methods.token_spans import TokenSpans
from server.engine.cuda.graph_tables import GraphTables
from server.engine.model.batch_tables import GpuBatch
from server.engine.model.forward_context import ActingBanks, ForwardContext
from server.engine.scheduling.row import Row
from server.kernels.cpu.paged_attention import BLOCK
from server.kernels.token_blocks import BLOCK_FIELDS, SMALL_BLOCK, BlockPlan, round_up

log = logging.getLogger(__name__)

RECORD_AFTER = 3  # occurrences of a signature
MAX_GRAPHS = 64  # the least recently used goes first

Call = Callable[[], torch.Tensor]


class Recorded(NamedTuple):
    """`replay` runs the step on the present content of its tables and writes the result into `output`."""

    replay: Callable[[], object]
    output: torch.Tensor


class CudaRecorder:
    """Records calls as CUDA graphs in one shared memory pool: they run one at a time, only outputs stay."""

    def __init__(self) -> None:
        self.pool: Any = None

    def __call__(self, call: Call) -> Recorded:
        """Call twice, so that kernels are compiled and libraries have their memory; then record the call.

        Raises RuntimeError if an operator cannot be recorded.
        """
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


@dataclass(frozen=True)
class GraphSignature:
    """What a recorded step can serve: a number of rows, and of each bank the sites and the highest rank."""

    rows: int
    traces: tuple[tuple[Bank, RecordedSites], ...]

    def covers(self, other: "GraphSignature") -> bool:
        """Whether this step can serve a batch of the other signature."""
        by_bank = dict(self.traces)
        return (
            self.rows == other.rows
            and by_bank.keys() == dict(other.traces).keys()
            and all(
                trace.mask & ~by_bank[bank].mask == 0 and trace.ranks <= by_bank[bank].ranks
                for bank, trace in other.traces
            )
        )

    @property
    def cost(self) -> int:
        """Of its adapter launches: sites times ranks."""
        return sum(trace.mask.bit_count() * trace.ranks for _, trace in self.traces)


class DecodeGraphs:
    """The recorded decode steps of a model. `run(ids, positions)`, both int64 [rows], computes the step that
    the context is set for: float32 logits [rows, vocabulary].
    """

    def __init__(
        self,
        step: ForwardContext,
        run: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
        device: torch.device,
        max_context: int,
    ) -> None:
        self.step, self.run, self.device = step, run, device
        self.record: Callable[[Call], Recorded] = CudaRecorder()
        self.max_blocks = -(-max_context // BLOCK)  # of a row
        self.occurrences: Counter[GraphSignature] = Counter()  # of signatures not yet recorded
        self.recorded: OrderedDict[GraphSignature, tuple[Recorded, GraphTables]] = OrderedDict()
        self.off = False
        self.replays = 0

    def forward(self, rows: list[Row]) -> torch.Tensor | None:
        """float32 logits [rows, vocabulary], valid until the next replay; None if no graph is recorded."""
        decoding = (row.completes and row.computed >= row.num_virtual_tokens for row in rows)
        if not all(row.scheduled == 1 for row in rows) or not all(decoding):
            return None  # some are in prefill
        signature = None if self.off else self.signature(rows)
        if signature is None:
            return None
        recorded = self._cheapest(signature)
        if recorded is None:
            if len(self.occurrences) > 16 * MAX_GRAPHS:
                self.occurrences.clear()
            self.occurrences[signature] += 1
            if self.occurrences[signature] < RECORD_AFTER or not self._record(signature):
                return None
            recorded = signature
        positions = [row.computed for row in rows]
        tokens = [row.tokens[position] for row, position in zip(rows, positions, strict=True)]
        return self._replay(recorded, rows, positions, tokens)

    def replay_with(self, rows: list[Row], positions: list[int], tokens: torch.Tensor) -> torch.Tensor | None:
        """`forward` for rows that will have these tokens, int64 [rows] on the device, at these positions.

        None if no recorded step serves them; none is recorded for it.
        """
        signature = None if self.off else self.signature(rows)
        recorded = signature and self._cheapest(signature)
        return self._replay(recorded, rows, positions, tokens) if recorded else None

    def _cheapest(self, needed: GraphSignature) -> GraphSignature | None:
        """Of the recorded steps that can serve a batch of this signature."""
        covering = (signature for signature in self.recorded if signature.covers(needed))
        return min(covering, key=lambda signature: signature.cost, default=None)

    def _replay(
        self,
        signature: GraphSignature,
        rows: list[Row],
        positions: list[int],
        tokens: list[int] | torch.Tensor,
    ) -> torch.Tensor:
        self.recorded.move_to_end(signature)
        recorded, tables = self.recorded[signature]
        tables.fill(rows, positions, tokens, [self._spans(rows, bank) for bank, _ in signature.traces])
        recorded.replay()
        self.replays += 1
        return recorded.output[: len(rows)]

    def signature(self, rows: list[Row]) -> GraphSignature | None:
        """What a recorded step must have to decode these rows; None if an adapter cannot be recorded, or a
        row has several or weighted ones.
        """
        needed: dict[Bank, RecordedSites] = {}
        for row in rows:
            acting = 0
            for use, slot in zip(row.uses, row.slots, strict=True):
                bank = self.step.banks[use.adapter.method]
                trace = bank.recorded_sites(slot)
                if trace is None or use.weight != 1:
                    return None
                if trace.mask:
                    acting += 1
                    other = needed.get(bank, RecordedSites())
                    needed[bank] = RecordedSites(trace.mask | other.mask, max(trace.ranks, other.ranks))
            if acting > 1:
                return None
        bucket = 1 << (len(rows) - 1).bit_length()
        rounded = {bank: RecordedSites(trace.mask, round_up(trace.ranks)) for bank, trace in needed.items()}
        return GraphSignature(bucket, tuple(sorted(rounded.items(), key=lambda pair: id(pair[0]))))

    def _spans(self, rows: list[Row], bank: Bank) -> list[tuple[int, int, int]]:
        return [
            (slot, i, i + 1)
            for i, row in enumerate(rows)
            for use, slot in zip(row.uses, row.slots, strict=True)
            if self.step.banks[use.adapter.method] is bank and bank.recorded_sites(slot) != RecordedSites()
        ]

    def _record(self, signature: GraphSignature) -> bool:
        """False if the model cannot be recorded: graphs are off from then on."""
        tables = GraphTables(signature.rows, len(signature.traces), self.max_blocks, self.device)
        try:
            recorded = self.record(lambda: self._run(signature, tables))
        except RuntimeError as error:  # for example, an operator of this model waits for the device
            log.warning("decode steps are not recorded as CUDA graphs: %s", error)
            self.off = True
            return False
        if len(self.recorded) >= MAX_GRAPHS:
            self.recorded.popitem(last=False)
        self.recorded[signature] = (recorded, tables)
        del self.occurrences[signature]
        return True

    def _run(self, signature: GraphSignature, tables: GraphTables) -> torch.Tensor:
        """Compute the step that reads these tables: logits [rows, vocabulary]. The context is overwritten."""
        ids, positions, lengths, kv_positions, *plans, blocks = tables.parts
        acting: ActingBanks = []
        for i, (bank, trace) in enumerate(signature.traces):
            plan = BlockPlan(plans[2 * i], plans[2 * i + 1].view(-1, BLOCK_FIELDS), SMALL_BLOCK, trace.ranks)
            acting.append((bank, TokenSpans.of_graph(plan, bank.touched(trace), signature.rows)))
        batch = GpuBatch(kv_positions, lengths, blocks, blocks.new_empty(0, 4))
        self.step.begin_graph(batch, acting)
        return self.run(ids, positions)
