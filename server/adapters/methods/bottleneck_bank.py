"""The bank of bottleneck adapters: h += U act(D x + d) + u at the outputs h of attention and MLP blocks.

As in affine_bank.py, each adapter is one flat buffer of exactly its own bytes, and a table of addresses has a
row for each slot and site.
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
    """The change at one site, all scalings folded in.

    down [width, hidden], down_bias [width], up [width, hidden] (transposed, so that its rows are contiguous),
    up_bias [hidden]. If epsilon is not 0, x is divided by its root mean square first.
    """

    site: str
    down: torch.Tensor
    down_bias: torch.Tensor
    up: torch.Tensor
    up_bias: torch.Tensor
    non_linearity: str
    input: Literal["output", "residual", "sum"]
    epsilon: float = 0.0


class BottleneckPiece(msgspec.Struct, frozen=True, gc=False):  # hundreds of thousands, and never in a cycle
    """A delta's place in the flat buffer: down, down_bias, up, up_bias, back to back."""

    site: str
    width: int
    non_linearity: str
    input: Literal["output", "residual", "sum"]
    epsilon: float


def pack_deltas(deltas: Iterable[BottleneckDelta], dtype: torch.dtype) -> Packed:
    """Pack deltas into one host buffer. Raises InvalidAdapter if a folded value overflows `dtype`."""
    pieces: list[BottleneckPiece] = []
    parts: list[torch.Tensor] = []
    for delta in deltas:
        pieces.append(
            BottleneckPiece(delta.site, delta.down.shape[0], delta.non_linearity, delta.input, delta.epsilon)
        )
        parts += [delta.down, delta.down_bias, delta.up, delta.up_bias]
    return Packed(flatten(parts, dtype), pieces)


def views(
    flat: torch.Tensor,
    pieces: Sequence[BottleneckPiece],
    hidden: int,
    split: Callable[[torch.Tensor, list[int]], Iterable[torch.Tensor]] = torch.split,
) -> Iterator[BottleneckDelta]:
    """Deltas as views of `flat` [n]. One split: in training its gradient is one concatenation."""
    sizes = [size for p in pieces for size in (p.width * hidden, p.width, p.width * hidden, hidden)]
    parts = iter(split(flat, sizes))
    for p, down, down_bias, up, up_bias in zip(pieces, parts, parts, parts, parts, strict=True):
        matrices = (down.view(-1, hidden), down_bias, up.view(-1, hidden), up_bias)
        yield BottleneckDelta(p.site, *matrices, p.non_linearity, p.input, p.epsilon)


class BottleneckBank(Bank):
    """Slots of adapters that change the outputs of attention and MLP blocks."""

    def __init__(self, base: Base, slots: int, device: torch.device, dtype: torch.dtype) -> None:
        self.hidden = base.hidden_size
        self.device = device
        self.deltas: list[dict[str, BottleneckDelta]] = [{} for _ in range(slots + 1)]
        names = [name for name, site in base.sites.items() if site.kind in ("attention", "mlp")]
        self.table = SiteTable(names, slots, kernel.COLUMNS, device)
        self.use_gpu_kernels = gpu.uses_triton(device)
        self.max_span = sys.maxsize if self.use_gpu_kernels else MAX_DECODE_SPAN
        self.use_kernels = self.use_gpu_kernels or (
            AVAILABLE and device.type == "cpu" and dtype == torch.float32
        )

    def put(self, slot: int, packed: Packed) -> None:
        """Fill an empty slot. On a CPU this copies nothing: the bank uses the host buffer."""
        flat = packed.flat.to(self.device, non_blocking=True)
        split = gpu.aligned if self.use_gpu_kernels else torch.split
        self.deltas[slot] = {delta.site: delta for delta in views(flat, packed.layout, self.hidden, split)}
        rows = {name: table_row(delta) for name, delta in self.deltas[slot].items()}
        self.table.put(slot, rows, max((piece.width for piece in packed.layout), default=0))

    def clear(self, slot: int) -> None:
        self.table.clear(slot)
        self.deltas[slot] = {}

    def sublayer(self, site: Site, h: torch.Tensor, r: torch.Tensor, rows: TokenSpans) -> None:
        if rows.touched is None:
            changed = {name for span in rows.spans for name in self.deltas[span.slot]}
            rows.touched = dict.fromkeys(changed, MATRICES)
        if site.name not in rows.touched:
            return
        rows.check_count(len(h))
        if self.use_kernels:
            self._launch(site, h, r, rows)
        for slot, start, end, _ in rows.other_spans if self.use_kernels else rows.spans:
            if delta := self.deltas[slot].get(site.name):
                apply(delta, h[start:end], r[start:end])

    def recorded_sites(self, slot: int) -> RecordedSites | None:
        return RecordedSites(self.table.masks[slot], self.table.ranks[slot]) if self.use_kernels else None

    def touched(self, recorded: RecordedSites) -> dict[str, int]:
        return dict.fromkeys(self.table.among(recorded.mask), MATRICES)

    def _launch(self, site: Site, h: torch.Tensor, r: torch.Tensor, rows: TokenSpans) -> None:
        number = self.table.numbers[site.name]
        if not self.use_gpu_kernels:
            if len(rows.tokens):
                kernel.grouped_bottleneck(h, r, rows.tokens, rows.slots, self.table.rows[:, number])
            return
        from server.kernels.gpu.grouped_bottleneck import grouped_bottleneck  # Triton is not everywhere

        plan = rows.block_plan(self.device, self.table.ranks.__getitem__)
        grouped_bottleneck(h, r, plan, self.table.rows, number)


def apply(delta: BottleneckDelta, h: torch.Tensor, r: torch.Tensor) -> None:
    """Apply one adapter to its tokens h [n, hidden] in place; r [n, hidden] is the residual before the block.

    The reference implementation of the kernels, and on a CPU faster than they are for many tokens.
    """
    x = h + r if delta.input == "sum" else r if delta.input == "residual" else h
    if x is h and torch.is_grad_enabled():
        x = h.clone()  # autograd keeps it while h changes
    z = x @ delta.down.T
    if delta.epsilon:
        z = z * torch.rsqrt(x.square().mean(-1, keepdim=True) + delta.epsilon)
    h.addmm_(ACTIVATIONS[delta.non_linearity](z + delta.down_bias), delta.up)
    h += delta.up_bias


def table_row(delta: BottleneckDelta) -> list[int]:
    """The COLUMNS numbers of a delta that kernels read."""
    parts = (delta.down, delta.down_bias, delta.up, delta.up_bias)
    kinds = (kernel.NON_LINEARITIES.index(delta.non_linearity), kernel.INPUTS.index(delta.input))
    epsilon = bits_of(delta.epsilon)
    return [*(t.data_ptr() for t in parts), delta.down.shape[0], *kinds, epsilon]
