"""LoRA on the device: each adapter is one flat buffer, and a table per site says where its pieces lie.

An adapter occupies exactly its own bytes, whatever its rank and targets; a slot is a row of a table.
Pieces per target, in the flat buffer:
    A     [r, in]
    B^T   [r, out]   all scalings folded in: alpha/r or alpha/sqrt(r), and DoRA's m/n per output
    gain  [out]      DoRA only: m/n - 1
    bias  [out]      lora_bias only, scaled
An embedding's A is kept [vocabulary, r], so that a token's row is contiguous.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec
import torch

from server.adapters.methods.base import Bank, Packed, Rows, Tensors
from server.adapters.sites import Base, Site
from server.errors import InvalidAdapter
from server.kernels import lora as kernel
from server.kernels.openmp import AVAILABLE

if TYPE_CHECKING:
    from server.adapters.methods.lora import LoraSpec, LoraTarget


class Piece(msgspec.Struct, frozen=True):
    """Where one target lies in the flat buffer, in elements; -1: absent."""

    site: str
    rank: int
    a: int
    b: int
    gain: int = -1
    bias: int = -1


@dataclass
class Views:
    """One adapter at one site, as tensors over its flat buffer."""

    a: torch.Tensor
    b: torch.Tensor
    gain: torch.Tensor | None
    bias: torch.Tensor | None


def pack_lora(
    spec: "LoraSpec", base: Base, tensors: Tensors, weights: Mapping[str, torch.Tensor], dtype: torch.dtype
) -> Packed:
    """Fold scalings and DoRA norms in. `weights`: {site: W [out, in]}, asked only for DoRA targets."""
    pieces: list[Piece] = []
    parts: list[torch.Tensor] = []
    offset = 0

    def place(tensor: torch.Tensor | None) -> int:
        nonlocal offset
        if tensor is None:
            return -1
        parts.append(tensor.to(dtype).reshape(-1))
        start, offset = offset, offset + tensor.numel()
        return start

    for target in spec.targets:
        a, b, gain, bias = fold(target, base.sites[target.site], tensors, weights)
        pieces.append(Piece(target.site, target.rank, place(a), place(b), place(gain), place(bias)))
    flat = torch.cat(parts)
    if not bool(torch.isfinite(flat).all()):
        raise InvalidAdapter(
            f"The adapter's weights overflow {str(dtype).removeprefix('torch.')} once scaled."
        )
    return Packed(flat, pieces)


def fold(
    target: "LoraTarget", site: Site, tensors: Tensors, weights: Mapping[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """A, scaled B^T, DoRA gain, scaled bias, in float32. Formulas: PEFT's lora/layer.py and lora/dora.py."""
    a, b = tensors[target.A].float(), tensors[target.B].float()
    scaled = target.scaling * b
    bias = None if target.bias is None else target.scaling * tensors[target.bias].float()
    if target.embedding:
        return a.T.contiguous(), site.scale * scaled.T.contiguous(), None, None
    if target.magnitude is None:
        return a, scaled.T.contiguous(), None, bias
    norm = torch.linalg.vector_norm(weights[target.site].float() + scaled @ a, dim=1)  # [out]
    ratio = tensors[target.magnitude].float().reshape(-1) / norm
    return a, (ratio[:, None] * scaled).T.contiguous(), ratio - 1, None if bias is None else ratio * bias


class LoraBank(Bank):
    """Slots for LoRA adapters. `put` and `clear` are called between steps, `affine` within one."""

    def __init__(self, base: Base, slots: int, device: torch.device, dtype: torch.dtype) -> None:
        self.base = base
        self.device = device
        self.views: list[dict[str, Views]] = [{} for _ in range(slots + 1)]
        self.tables = {name: torch.zeros(slots + 1, kernel.COLUMNS, dtype=torch.int64) for name in base.sites}
        self.fast = AVAILABLE and device.type == "cpu" and dtype == torch.float32

    def put(self, slot: int, packed: Packed) -> None:
        """Fill a free slot. On a CPU this copies nothing: the host buffer is the device's."""
        flat = packed.flat.to(self.device, non_blocking=True)
        for piece in packed.layout:
            site = self.base.sites[piece.site]
            views = view(flat, piece, site)
            self.views[slot][piece.site] = views
            row = self.tables[piece.site][slot]
            row[kernel.A], row[kernel.B], row[kernel.RANK] = (
                views.a.data_ptr(),
                views.b.data_ptr(),
                piece.rank,
            )
            row[kernel.GAIN] = 0 if views.gain is None else views.gain.data_ptr()
            row[kernel.BIAS] = 0 if views.bias is None else views.bias.data_ptr()

    def clear(self, slot: int) -> None:
        for name in self.views[slot]:
            self.tables[name][slot].zero_()
        self.views[slot] = {}

    def affine(
        self, site: Site, x: torch.Tensor, y: torch.Tensor, rows: Rows, bias: torch.Tensor | None
    ) -> None:
        """y [T, out] += each token's adapter at this site; x is [T, in], or token ids [T] of an embedding."""
        if site.kind == "embedding":
            for slot, start, end in rows.spans:
                if found := self.views[slot].get(site.name):
                    y[start:end] += found.a[x[start:end]] @ found.b
            return
        if rows.tokens.shape[0] and self.fast:
            kernel.grouped_lora(x, y, rows.tokens, rows.slots, self.tables[site.name], bias)
        for slot, start, end in rows.many if self.fast else rows.spans:
            if found := self.views[slot].get(site.name):
                add(x[start:end], y[start:end], found, bias)


def add(x: torch.Tensor, y: torch.Tensor, views: Views, bias: torch.Tensor | None) -> None:
    """Many tokens of one adapter as two GEMMs; also the plain twin of the kernel."""
    if views.gain is not None:
        y += views.gain * (y if bias is None else y - bias)
    y.addmm_(x @ views.a.T, views.b)
    if views.bias is not None:
        y += views.bias


def view(flat: torch.Tensor, piece: Piece, site: Site) -> Views:
    def at(start: int, *shape: int) -> torch.Tensor:
        count = 1
        for size in shape:
            count *= size
        return flat[start : start + count].view(*shape)

    shape = (site.inputs, piece.rank) if site.kind == "embedding" else (piece.rank, site.inputs)
    return Views(
        a=at(piece.a, *shape),
        b=at(piece.b, piece.rank, site.outputs),
        gain=None if piece.gain < 0 else at(piece.gain, site.outputs),
        bias=None if piece.bias < 0 else at(piece.bias, site.outputs),
    )
