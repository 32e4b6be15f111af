"""Bottleneck adapters on the device: h += U act(D x + d) + u at the outputs of attention and MLP blocks.

As in affine.py, each adapter is one flat buffer of exactly its own bytes, whatever its widths and layers,
and a table per site says where its pieces lie; a slot is a row of a table.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

import msgspec
import torch
import torch.nn.functional as F

from server.adapters.methods.base import Bank, Packed, Rows
from server.adapters.methods.tensors import flatten
from server.adapters.sites import Base, Site
from server.kernels import bottleneck as kernel
from server.kernels.openmp import AVAILABLE

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
class Change:
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


class Piece(msgspec.Struct, frozen=True):
    """A change in the flat buffer, from element `start`: down, down_bias, up, up_bias, back to back."""

    site: str
    start: int
    width: int
    non_linearity: str
    input: Literal["output", "residual", "sum"]
    epsilon: float


def pack_changes(changes: Iterable[Change], dtype: torch.dtype) -> Packed:
    """One host buffer. Raises InvalidAdapter if a folded value overflows `dtype`."""
    pieces: list[Piece] = []
    parts: list[torch.Tensor] = []
    offset = 0
    for c in changes:
        pieces.append(Piece(c.site, offset, c.down.shape[0], c.non_linearity, c.input, c.epsilon))
        for tensor in (c.down, c.down_bias, c.up, c.up_bias):
            parts.append(tensor)
            offset += tensor.numel()
    return Packed(flatten(parts, dtype), pieces)


def view(flat: torch.Tensor, piece: Piece, hidden: int) -> Change:
    b = piece.width
    sizes = [b * hidden, b, b * hidden, hidden]
    down, down_bias, up, up_bias = torch.split(flat[piece.start : piece.start + sum(sizes)], sizes)
    matrices = (down.view(b, hidden), down_bias, up.view(b, hidden), up_bias)
    return Change(piece.site, *matrices, piece.non_linearity, piece.input, piece.epsilon)


class BottleneckBank(Bank):
    """Slots for adapters that act on the outputs of sub-blocks."""

    def __init__(self, base: Base, slots: int, device: torch.device, dtype: torch.dtype) -> None:
        self.hidden = base.hidden_size
        self.device = device
        self.changes: list[dict[str, Change]] = [{} for _ in range(slots + 1)]
        self.tables = {
            name: torch.zeros(slots + 1, kernel.COLUMNS, dtype=torch.int64)
            for name, site in base.sites.items()
            if site.kind in ("attention", "mlp")
        }
        self.fast = AVAILABLE and device.type == "cpu" and dtype == torch.float32

    def put(self, slot: int, packed: Packed) -> None:
        """Fill a free slot. On a CPU this copies nothing: the host buffer is the device's."""
        flat = packed.flat.to(self.device, non_blocking=True)
        for piece in packed.layout:
            self.changes[slot][piece.site] = change = view(flat, piece, self.hidden)
            self.tables[piece.site][slot] = table_row(change)

    def clear(self, slot: int) -> None:
        for name in self.changes[slot]:
            self.tables[name][slot].zero_()
        self.changes[slot] = {}

    def sublayer(self, site: Site, h: torch.Tensor, r: torch.Tensor, rows: Rows) -> None:
        if rows.touched is None:
            rows.touched = {name: True for span in rows.spans for name in self.changes[span.slot]}
        if site.name not in rows.touched:
            return
        if self.fast and rows.tokens.shape[0]:
            kernel.grouped_bottleneck(h, r, rows.tokens, rows.slots, self.tables[site.name])
        for slot, start, end, _ in rows.many if self.fast else rows.spans:
            if change := self.changes[slot].get(site.name):
                apply(change, h[start:end], r[start:end])


def apply(change: Change, h: torch.Tensor, r: torch.Tensor) -> None:
    """One adapter's tokens, in place; the plain twin of the kernel, and the better way for many tokens."""
    x = h + r if change.input == "sum" else r if change.input == "residual" else h
    z = x @ change.down.T
    if change.epsilon:
        z = z * torch.rsqrt(x.square().mean(-1, keepdim=True) + change.epsilon)
    h.addmm_(ACTIVATIONS[change.non_linearity](z + change.down_bias), change.up)
    h += change.up_bias


def table_row(change: Change) -> torch.Tensor:
    """What the kernel reads of a change, int64 [COLUMNS]."""
    parts = (change.down, change.down_bias, change.up, change.up_bias)
    kinds = (kernel.NON_LINEARITIES.index(change.non_linearity), kernel.INPUTS.index(change.input))
    epsilon = kernel.epsilon_bits(change.epsilon)
    return torch.tensor([*(t.data_ptr() for t in parts), change.down.shape[0], *kinds, epsilon])
