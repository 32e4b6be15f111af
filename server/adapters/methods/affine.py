"""Everything that is affine at a site, on the device: LoRA, biases, scaled outputs. One bank serves them all.

    y  ->  y + gain * (y - b) + B A x + bias        with y = W x + b, the base's own output

Each adapter is one flat buffer, and a table per site says where its pieces lie: an adapter occupies exactly
its own bytes, whatever its rank and targets, and a slot is a row of a table. At a norm there is no A and B.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod

import msgspec
import torch

from server.adapters.methods.base import Bank, Packed, Rows
from server.adapters.methods.tensors import flatten
from server.adapters.sites import Base, Site
from server.kernels import affine as kernel
from server.kernels.openmp import AVAILABLE


@dataclass(frozen=True)
class Change:
    """What an adapter does at one site, all scalings folded in; absent parts do nothing.

    a [r, in] (of an embedding [vocabulary, r], so that a token's row is contiguous), b [r, out],
    gain [out], bias [out]. scale [in], upon the inputs, is for banks that have the hook for it.
    """

    site: str
    a: torch.Tensor | None = None
    b: torch.Tensor | None = None
    gain: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    scale: torch.Tensor | None = None


class Piece(msgspec.Struct, frozen=True):
    """One tensor of a change; in the flat buffer they lie back to back, in order."""

    site: str
    part: str
    shape: tuple[int, ...]


def pack_changes(changes: Iterable[Change], dtype: torch.dtype) -> Packed:
    """One host buffer. Raises InvalidAdapter if a folded value overflows `dtype`."""
    pieces: list[Piece] = []
    parts: list[torch.Tensor] = []
    for change in changes:
        for part in ("a", "b", "gain", "bias", "scale"):
            tensor: torch.Tensor | None = getattr(change, part)
            if tensor is not None:
                pieces.append(Piece(change.site, part, tuple(tensor.shape)))
                parts.append(tensor)
    scaled = any(piece.part in ("gain", "scale") for piece in pieces)
    return Packed(flatten(parts, dtype), pieces, summable=not scaled)


class AffineBank(Bank):
    """Slots for adapters that change sites affinely."""

    def __init__(self, base: Base, slots: int, device: torch.device, dtype: torch.dtype) -> None:
        self.device = device
        self.changes: list[dict[str, Change]] = [{} for _ in range(slots + 1)]
        self.tables = {
            name: torch.zeros(slots + 1, kernel.COLUMNS, dtype=torch.int64)
            for name, site in base.sites.items()
            if site.kind in ("linear", "embedding", "norm")
        }
        self.fast = AVAILABLE and device.type == "cpu" and dtype == torch.float32

    def put(self, slot: int, packed: Packed) -> None:
        """Fill a free slot. On a CPU this copies nothing: the host buffer is the device's."""
        flat = packed.flat.to(self.device, non_blocking=True)
        found: dict[str, dict[str, torch.Tensor]] = {}
        # one split, so that in training the gradients come back as one concatenation
        views = torch.split(flat, [prod(piece.shape) for piece in packed.layout])
        for piece, view in zip(packed.layout, views, strict=True):
            found.setdefault(piece.site, {})[piece.part] = view.view(piece.shape)
        for name, parts in found.items():
            self.changes[slot][name] = change = Change(name, **parts)
            addresses = [
                0 if t is None else t.data_ptr() for t in (change.a, change.b, change.gain, change.bias)
            ]
            rank = 0 if change.b is None else change.b.shape[0]
            assert rank <= kernel.MAX_RANK, f"rank {rank} is over the kernel's scratch"
            self.tables[name][slot] = torch.tensor([*addresses, rank])

    def clear(self, slot: int) -> None:
        for name in self.changes[slot]:
            self.tables[name][slot].zero_()
        self.changes[slot] = {}

    def affine(
        self, site: Site, x: torch.Tensor, y: torch.Tensor, rows: Rows, bias: torch.Tensor | None
    ) -> None:
        if rows.touched is None:
            rows.touched = self._touched(rows)
        if site.name not in rows.touched:
            return
        fast = self.fast and site.kind != "embedding"
        if fast and rows.tokens.shape[0]:
            heavy = rows.touched[site.name]
            kernel.grouped_affine(x, y, rows.tokens, rows.slots, self.tables[site.name], bias, heavy=heavy)
        for slot, start, end, weight in rows.many if fast else rows.spans:
            if change := self.changes[slot].get(site.name):
                apply(change, site, x[start:end], y[start:end], bias, weight)

    def _touched(self, rows: Rows) -> dict[str, bool]:
        touched: dict[str, bool] = {}
        for slot in {span.slot for span in rows.spans}:
            for name, change in self.changes[slot].items():
                touched[name] = change.b is not None or touched.get(name, False)
        return touched


def apply(
    change: Change,
    site: Site,
    x: torch.Tensor,
    y: torch.Tensor,
    bias: torch.Tensor | None,
    weight: float = 1.0,
) -> None:
    """One adapter's tokens, in place; the plain twin of the kernel, and the better way for many tokens.

    `weight` scales what is added; an adapter with a gain is never weighted.
    """
    if change.gain is not None:
        own = y.clone() if bias is None else y - bias  # a copy: autograd keeps it while y changes
        y.addcmul_(change.gain, own)
    if change.a is not None and change.b is not None:
        if site.kind == "embedding":
            real = x >= 0  # virtual tokens have no row in a table
            y[real] += weight * (change.a[x[real]] @ change.b)
        else:
            y.addmm_(x @ change.a.T, change.b, alpha=weight)
    if change.bias is not None:
        y.add_(change.bias, alpha=weight)
