"""Bottleneck adapters on the device: h += U act(D x + d) + u at the outputs of attention and MLP blocks.

As in affine_bank.py, each adapter is one flat buffer of exactly its own bytes, whatever its widths and
layers, and a table per site says where its pieces lie; a slot is a row of a table.
"""

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import msgspec
import torch
import torch.nn.functional as F

from server.adapters.methods.flat_buffer import flatten
from server.adapters.methods.interface import Bank, Packed, RecordedSites
from server.adapters.methods.token_spans import MATRICES, MAX_DECODE_SPAN, TokenSpans
from server.adapters.sites import Base, Site
from server.kernels import token_blocks as gpu
from server.kernels.cpu import grouped_bottleneck as kernel
from server.kernels.cpu.openmp import AVAILABLE, bits_of
from server.kernels.site_table import SiteTable

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "linear": lambda z: z,
    "relu": F.relu,
    "leakyrelu": F.leaky_relu,
    "tanh": torch.tanh,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_new": lambda z: F.gelu(z, approximate="tanh"),
}


@dataclass(frozen=True)
class BottleneckDelta:
    """What an adapter does at one site, all scalings folded in.

    down [b, hidden], down_bias [b], up [b, hidden] (transposed, so that a width's row is contiguous),
    up_bias [hidden]. With an epsilon, x is divided by its root mean square first.
    """

    site: str
    down: torch.Tensor
    down_bias: torch.Tensor
    up: torch.Tensor
    up_bias: torch.Tensor
    non_linearity: str
    input: Literal["output", "residual", "sum"]
    epsilon: float = 0.0


class BottleneckPiece(msgspec.Struct, frozen=True, gc=False):  # by the hundred thousand, and no cycle
    """A change in the flat buffer: down, down_bias, up, up_bias, back to back, behind the piece before it."""

    site: str
    width: int
    non_linearity: str
    input: Literal["output", "residual", "sum"]
    epsilon: float


def pack_deltas(changes: Iterable[BottleneckDelta], dtype: torch.dtype) -> Packed:
    """One host buffer. Raises InvalidAdapter if a folded value overflows `dtype`."""
    pieces: list[BottleneckPiece] = []
    parts: list[torch.Tensor] = []
    for c in changes:
        pieces.append(BottleneckPiece(c.site, c.down.shape[0], c.non_linearity, c.input, c.epsilon))
        parts += [c.down, c.down_bias, c.up, c.up_bias]
    return Packed(flatten(parts, dtype), pieces)


def views(
    flat: torch.Tensor,
    pieces: Sequence[BottleneckPiece],
    hidden: int,
    split: Callable[[torch.Tensor, list[int]], Iterable[torch.Tensor]] = torch.split,
) -> Iterator[BottleneckDelta]:
    """The pieces' changes; one split, so that in training the gradients come back as one concatenation."""
    sizes = [size for p in pieces for size in (p.width * hidden, p.width, p.width * hidden, hidden)]
    parts = iter(split(flat, sizes))
    for p, down, down_bias, up, up_bias in zip(pieces, parts, parts, parts, parts, strict=True):
        matrices = (down.view(-1, hidden), down_bias, up.view(-1, hidden), up_bias)
        yield BottleneckDelta(p.site, *matrices, p.non_linearity, p.input, p.epsilon)


class BottleneckBank(Bank):
    """Slots for adapters that act on the outputs of sub-blocks."""

    def __init__(self, base: Base, slots: int, device: torch.device, dtype: torch.dtype) -> None:
        self.hidden = base.hidden_size
        self.device = device
        self.changes: list[dict[str, BottleneckDelta]] = [{} for _ in range(slots + 1)]
        names = [name for name, site in base.sites.items() if site.kind in ("attention", "mlp")]
        self.table = SiteTable(names, slots, kernel.COLUMNS, device)
        self.gpu = gpu.uses_triton(device)
        self.most = sys.maxsize if self.gpu else MAX_DECODE_SPAN
        self.fast = self.gpu or (AVAILABLE and device.type == "cpu" and dtype == torch.float32)

    def put(self, slot: int, packed: Packed) -> None:
        """Fill a free slot. On a CPU this copies nothing: the host buffer is the device's."""
        flat = packed.flat.to(self.device, non_blocking=True)
        split = gpu.aligned if self.gpu else torch.split
        self.changes[slot] = {c.site: c for c in views(flat, packed.layout, self.hidden, split)}
        rows = {name: table_row(change) for name, change in self.changes[slot].items()}
        self.table.put(slot, rows, max((piece.width for piece in packed.layout), default=0))

    def clear(self, slot: int) -> None:
        self.table.clear(slot)
        self.changes[slot] = {}

    def sublayer(self, site: Site, h: torch.Tensor, r: torch.Tensor, rows: TokenSpans) -> None:
        if rows.touched is None:
            changed = {name for span in rows.spans for name in self.changes[span.slot]}
            rows.touched = dict.fromkeys(changed, MATRICES)
        if site.name not in rows.touched:
            return
        rows.check(len(h))
        if self.fast:
            self._launch(site, h, r, rows)
        for slot, start, end, _ in rows.many if self.fast else rows.spans:
            if change := self.changes[slot].get(site.name):
                apply(change, h[start:end], r[start:end])

    def trace(self, slot: int) -> RecordedSites | None:
        return RecordedSites(self.table.masks[slot], self.table.ranks[slot]) if self.fast else None

    def touched(self, trace: RecordedSites) -> dict[str, int]:
        return dict.fromkeys(self.table.among(trace.mask), MATRICES)

    def _launch(self, site: Site, h: torch.Tensor, r: torch.Tensor, rows: TokenSpans) -> None:
        number = self.table.numbers[site.name]
        if not self.gpu:
            if len(rows.tokens):
                kernel.grouped_bottleneck(h, r, rows.tokens, rows.slots, self.table.rows[:, number])
            return
        from server.kernels.gpu.grouped_bottleneck import grouped_bottleneck  # Triton is not everywhere

        plan = rows.plan(self.device, self.table.ranks.__getitem__)
        grouped_bottleneck(h, r, plan, self.table.rows, number)


def apply(change: BottleneckDelta, h: torch.Tensor, r: torch.Tensor) -> None:
    """One adapter's tokens, in place; the plain twin of the kernel, and the better way for many tokens."""
    x = h + r if change.input == "sum" else r if change.input == "residual" else h
    if x is h and torch.is_grad_enabled():
        x = h.clone()  # autograd keeps it while h changes
    z = x @ change.down.T
    if change.epsilon:
        z = z * torch.rsqrt(x.square().mean(-1, keepdim=True) + change.epsilon)
    h.addmm_(ACTIVATIONS[change.non_linearity](z + change.down_bias), change.up)
    h += change.up_bias


def table_row(change: BottleneckDelta) -> list[int]:
    """What a kernel reads of a change: COLUMNS numbers."""
    parts = (change.down, change.down_bias, change.up, change.up_bias)
    kinds = (kernel.NON_LINEARITIES.index(change.non_linearity), kernel.INPUTS.index(change.input))
    epsilon = bits_of(change.epsilon)
    return [*(t.data_ptr() for t in parts), change.down.shape[0], *kinds, epsilon]
