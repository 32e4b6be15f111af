"""Steps on a CPU as one launch: layers recorded once for so many tokens and what their adapters touch.

Between the kernels of a step stood a quarter of its time: thirty layers of Python, each a dozen launches. A
program runs them all in one parallel region. What differs from step to step lies in tensors at fixed
addresses, filled before it runs; kernels read from them what a launch's arguments cannot say.

Recorded are steps in which all tokens read their past in place (rows that decode, chunks of prompts) and
every adapter is a bank's that can be (`Bank.recorded_sites`); others run layer by layer. Results are the same
bit for bit: it is the same kernels in the same order. To record a step takes no longer than what else stands
between its kernels, so each is recorded when it first comes.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from server.adapters.methods.interface import Bank, RecordedSites
from server.adapters.methods.token_spans import TokenSpans
from server.engine.model.forward_context import ForwardContext
from server.kernels.cpu.openmp import Arena, Recorder
from server.kernels.cpu.paged_attention import BLOCK
from server.kernels.cpu.recorded_launches import RecordedLaunches

MOST = 128  # programs that are kept, of some hundred KiB each; the one longest unused goes
MOST_TOKENS = 512  # of a recorded step: beyond that, what stands between its kernels is little

Layer = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]  # (stream, cos, sin) -> stream
Acting = tuple[Bank, TokenSpans]


class StepSignature(NamedTuple):
    """What a program must hold: so many tokens, several of one row or not, and of each bank these sites."""

    tokens: int
    ahead: bool
    affine: tuple[tuple[Bank, RecordedSites], ...]
    sublayer: tuple[tuple[Bank, RecordedSites], ...]


class StepBuffers:
    """What a recorded step of `need` reads, at fixed addresses; and what it gives."""

    def __init__(
        self, need: StepSignature, x: torch.Tensor, cos: torch.Tensor, blocks: int, arena: Arena
    ) -> None:
        count = need.tokens
        self.x = arena.take("x", x, tuple(x.shape))
        self.cos, self.sin = (arena.take(name, cos, tuple(cos.shape)) for name in ("cos", "sin"))
        none = torch.zeros(count, dtype=torch.int64)
        self.tables = arena.take("tables", none, (count, blocks))  # no more of a row than its length is read
        self.lengths, self.ahead = none.clone(), none.clone()
        self.affine, self.sublayer = (
            [(bank, TokenSpans.of_recorded_step(count, bank.touched(trace))) for bank, trace in traces]
            for traces in (need.affine, need.sublayer)
        )
        self.output = torch.empty(0)

    def fill(self, step: ForwardContext, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
        self.x.copy_(x)
        self.cos.copy_(cos)
        self.sin.copy_(sin)
        self.tables[:, : step.tables.shape[1]] = step.tables
        self.lengths.copy_(step.lengths)
        if step.ahead is not None:
            self.ahead.copy_(step.ahead)
        for held, acting in ((self.affine, step.affine), (self.sublayer, step.sublayer)):
            own = dict(acting)
            for bank, rows in held:
                rows.copy_from(own[bank])


class RecordedSteps:
    """Recorded steps of these layers."""

    def __init__(self, layers: Sequence[Layer], step: ForwardContext, max_context: int) -> None:
        self.layers, self.step = layers, step
        self.blocks = min(-(-max_context // BLOCK), step.pages.count)  # of one row, at most
        self.arena = Arena()
        self.recorded: OrderedDict[StepSignature, tuple[RecordedLaunches, StepBuffers]] = OrderedDict()
        self.runs = 0
        self.off = False

    def run(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor | None:
        """x [T, hidden] after all layers, good until the next step; None if this step is not recorded."""
        need = self._need(len(x))
        if need is None:
            return None
        if need not in self.recorded:
            self._record(need, x, cos)
        self.recorded.move_to_end(need)
        program, held = self.recorded[need]
        held.fill(self.step, x, cos, sin)
        program()
        self.runs += 1
        return held.output

    def clear(self) -> None:
        """Keep no program."""
        self.recorded.clear()
        self.runs = 0

    def _need(self, tokens: int) -> StepSignature | None:
        """What the step that is set needs; None if a row has a long chunk, or adapters that take Python."""
        step = self.step
        if self.off or step.in_place != tokens or tokens > MOST_TOKENS or step.inputs or step.norm:
            return None
        if step.watched and (step.affine or step.sublayer):  # their time is asked for, not the launches'
            return None
        traces = []
        for acting in (step.affine, step.sublayer):
            own = []
            for bank, rows in acting:
                mask = biased = 0
                for slot in {span.slot for span in rows.kernel_spans}:
                    trace = bank.recorded_sites(slot)
                    if trace is None:
                        return None
                    mask |= trace.mask
                    biased |= trace.biased
                if rows.other_spans:
                    return None
                own.append((bank, RecordedSites(mask, biased=biased)))
            traces.append(tuple(own))
        return StepSignature(tokens, step.ahead is not None, traces[0], traces[1])

    def _record(self, need: StepSignature, x: torch.Tensor, cos: torch.Tensor) -> None:
        """As the step under way, but of what is held; that is set again afterwards."""
        step = self.step
        held = StepBuffers(need, x, cos, self.blocks, self.arena)
        own = (step.tables, step.lengths, step.ahead, step.affine, step.sublayer)
        step.tables, step.lengths, step.affine, step.sublayer = (
            held.tables,
            held.lengths,
            held.affine,
            held.sublayer,
        )
        step.ahead = held.ahead if need.ahead else None
        try:
            with Recorder(self.arena) as recorder:
                stream = held.x
                for layer in self.layers:
                    recorder.turn()
                    stream = layer(stream, held.cos, held.sin)
        finally:
            step.tables, step.lengths, step.ahead, step.affine, step.sublayer = own
        held.output = stream
        if len(self.recorded) >= MOST:
            self.recorded.popitem(last=False)
        self.recorded[need] = (RecordedLaunches(recorder), held)
