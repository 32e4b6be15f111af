"""Steps on a CPU as one launch: the kernels of all layers are recorded once for each kind of step, then
replayed.

Between kernels, Python took 25 % of a step: thirty layers of a dozen launches each. A recorded step runs them
all in one parallel region. Whatever differs from step to step lies in tensors at fixed addresses, which are
filled before the launch and read by the kernels.

A step can be recorded if all its tokens read their past in place (rows that decode, chunks of prompts) and
all its adapters belong to banks that support it (`Bank.recorded_sites`); other steps run layer by layer.
Results are the same bit for bit, for the same kernels run in the same order. Recording takes no longer than
launching the kernels one by one, so a step is recorded the first time its signature occurs.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from server.adapters.methods.interface import Bank, RecordedSites
from server.adapters.methods.token_spans import TokenSpans
from server.engine.model.forward_context import ActingBanks, ForwardContext
from server.kernels.cpu.openmp import Arena, Recorder
from server.kernels.cpu.paged_attention import BLOCK
from server.kernels.cpu.recorded_launches import RecordedLaunches

MAX_RECORDED = 128  # recorded steps, of some hundred KiB each; the least recently used goes first
MAX_RECORDED_TOKENS = 512  # of a recorded step: beyond that, launches are a small part of its time

Layer = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]  # (stream, cos, sin) -> stream


class StepSignature(NamedTuple):
    """What tells recorded steps apart: the number of tokens, and the sites each bank's adapters touch."""

    tokens: int
    multi_token_rows: bool  # some row has several tokens, whose K/V are written before they attend
    affine: tuple[tuple[Bank, RecordedSites], ...]
    sublayer: tuple[tuple[Bank, RecordedSites], ...]


class StepBuffers:
    """Inputs of a recorded step at fixed addresses, and its output."""

    def __init__(
        self, signature: StepSignature, x: torch.Tensor, cos: torch.Tensor, blocks: int, arena: Arena
    ) -> None:
        """x [T, hidden] and cos [T, head_dim] give shapes and types; `blocks`: of the longest row."""
        count = signature.tokens
        self.x = arena.take("x", x, tuple(x.shape))
        self.cos, self.sin = (arena.take(name, cos, tuple(cos.shape)) for name in ("cos", "sin"))
        zeros = torch.zeros(count, dtype=torch.int64)
        self.tables = arena.take("tables", zeros, (count, blocks))  # read up to the row's length only
        self.lengths, self.kv_positions = zeros.clone(), zeros.clone()
        self.affine, self.sublayer = (
            [(bank, TokenSpans.of_recorded_step(count, bank.touched(sites))) for bank, sites in acting]
            for acting in (signature.affine, signature.sublayer)
        )
        self.output = torch.empty(0)  # [T, hidden]

    def fill(self, step: ForwardContext, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
        """Copy the current step's inputs: x [T, hidden], cos and sin [T, head_dim], and its metadata."""
        self.x.copy_(x)
        self.cos.copy_(cos)
        self.sin.copy_(sin)
        self.tables[:, : step.tables.shape[1]] = step.tables
        self.lengths.copy_(step.lengths)
        if step.kv_positions is not None:
            self.kv_positions.copy_(step.kv_positions)
        for recorded, acting in ((self.affine, step.affine), (self.sublayer, step.sublayer)):
            by_bank = dict(acting)
            for bank, rows in recorded:
                rows.copy_from(by_bank[bank])


class RecordedSteps:
    """The recorded steps of a model's layers."""

    def __init__(self, layers: Sequence[Layer], step: ForwardContext, max_context: int) -> None:
        self.layers, self.step = layers, step
        self.max_blocks = min(-(-max_context // BLOCK), step.pages.count)  # of one row
        self.arena = Arena()
        self.recorded: OrderedDict[StepSignature, tuple[RecordedLaunches, StepBuffers]] = OrderedDict()
        self.runs = 0
        self.off = False

    def run(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor | None:
        """x [T, hidden] after all layers, valid until the next step; None if this step cannot be recorded."""
        signature = self._signature(len(x))
        if signature is None:
            return None
        if signature not in self.recorded:
            self._record(signature, x, cos)
        self.recorded.move_to_end(signature)
        launches, buffers = self.recorded[signature]
        buffers.fill(self.step, x, cos, sin)
        launches()
        self.runs += 1
        return buffers.output

    def clear(self) -> None:
        """Drop all recorded steps."""
        self.recorded.clear()
        self.runs = 0

    def _signature(self, tokens: int) -> StepSignature | None:
        """The current step's; None if a row has a long chunk, or adapters that cannot be recorded."""
        step = self.step
        if self.off or step.in_place != tokens or tokens > MAX_RECORDED_TOKENS or step.inputs or step.norm:
            return None
        if step.timed and (step.affine or step.sublayer):  # timing needs a Python call for each bank
            return None
        affine = _sites_by_bank(step.affine)
        sublayer = _sites_by_bank(step.sublayer)
        if affine is None or sublayer is None:
            return None
        return StepSignature(tokens, step.kv_positions is not None, affine, sublayer)

    def _record(self, signature: StepSignature, x: torch.Tensor, cos: torch.Tensor) -> None:
        """Run the layers on new buffers, recording their launches instead of making them."""
        buffers = StepBuffers(signature, x, cos, self.max_blocks, self.arena)
        inputs = (buffers.tables, buffers.lengths)
        positions = buffers.kv_positions if signature.multi_token_rows else None
        reading_buffers = self.step.recording(*inputs, positions, buffers.affine, buffers.sublayer)
        with reading_buffers, Recorder(self.arena) as recorder:
            stream = buffers.x
            for layer in self.layers:
                recorder.next_layer()
                stream = layer(stream, buffers.cos, buffers.sin)
        buffers.output = stream
        if len(self.recorded) >= MAX_RECORDED:
            self.recorded.popitem(last=False)
        self.recorded[signature] = (RecordedLaunches(recorder), buffers)


def _sites_by_bank(acting: ActingBanks) -> tuple[tuple[Bank, RecordedSites], ...] | None:
    """Of each bank the sites that the batch's adapters touch; None if one of them cannot be recorded."""
    by_bank = []
    for bank, rows in acting:
        mask = biased = 0
        for slot in {span.slot for span in rows.kernel_spans}:
            sites = bank.recorded_sites(slot)
            if sites is None:
                return None
            mask |= sites.mask
            biased |= sites.biased
        if rows.other_spans:
            return None
        by_bank.append((bank, RecordedSites(mask, biased=biased)))
    return tuple(by_bank)
