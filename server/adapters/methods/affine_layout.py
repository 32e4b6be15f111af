"""What an affine adapter does at each site, and where its tensors lie in its flat buffer.

AffineDelta is the change at one site, TensorPiece one tensor in a buffer, and SlotLayout the offsets and site
masks of a list of pieces. A LoRA has hundreds of pieces, and going through them takes a millisecond or more
of the engine's thread whenever an adapter enters a slot. The loader gives the same list to all adapters that
were made alike (parse_cache.py), so SlotLayouts keeps the last layouts by the list's identity.
"""

from collections import OrderedDict
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

import msgspec
import numpy as np
import torch

from server.adapters.methods.token_spans import BIAS, MATRICES, SCALE
from server.kernels import token_blocks as gpu
from server.kernels.cpu import grouped_affine as kernel
from server.kernels.limits import MAX_RANK
from server.kernels.site_table import SiteTable


@dataclass(frozen=True)
class AffineDelta:
    """The change at one site; absent parts change nothing.

    a [r, in] (of an embedding [vocabulary, r], so that a token's row is contiguous), b [r, out], gain [out],
    bias [out]. scale [in] multiplies the inputs, in banks with the hook `inputs`. norm [1 or 2, out]: a
    weight, and a bias if the norm has one, that replace the base's. `factor` is still to be multiplied into b
    when it is packed; in a bank it is 1. Matrices may have fewer bits than the inputs and outputs.
    """

    site: str
    a: torch.Tensor | None = None
    b: torch.Tensor | None = None
    gain: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    scale: torch.Tensor | None = None
    norm: torch.Tensor | None = None
    factor: float = 1.0


COLUMN = {"a": 0, "b": 1, "gain": kernel.GAIN, "bias": kernel.BIAS}
MAX_LAYOUTS = 64  # kept in a bank


class TensorPiece(msgspec.Struct, frozen=True, gc=False):  # hundreds of thousands, and never in a cycle
    """One tensor of a delta. The pieces of an adapter lie in the flat buffer back to back, in order."""

    site: str
    part: str
    shape: tuple[int, ...]


class SlotLayout:
    """Offsets of pieces in a buffer of numbers of `item` bytes, and the sites that they change.

    `ways`: site -> BIAS, SCALE or MATRICES. `mask`: bits of these sites in the table; `biased`: of those with
    BIAS. `norms`: norms whose parameters are replaced, which are in none of these.
    """

    def __init__(self, pieces: list[TensorPiece], table: SiteTable, item: int) -> None:
        self.pieces = pieces  # kept alive, so that no other list gets its id
        parts: dict[str, set[str]] = {}
        self.rank, begin = 0, 0
        offsets = np.zeros((len(table.names), kernel.COLUMNS), dtype=np.int64)
        present = np.zeros_like(offsets)
        for piece in pieces:
            parts.setdefault(piece.site, set()).add(piece.part)
            site = table.numbers[piece.site]
            if (column := COLUMN.get(piece.part)) is not None:
                offsets[site, column], present[site, column] = item * begin, 1
            if piece.part == "b":
                offsets[site, kernel.RANK], offsets[site, kernel.ITEM] = piece.shape[0], item
                self.rank = max(self.rank, piece.shape[0])
            begin += prod(piece.shape)
        self._offsets, self._present = torch.from_numpy(offsets), torch.from_numpy(present)
        assert self.rank <= MAX_RANK, f"rank {self.rank} is over the kernel's scratch"
        self.norms = frozenset(site for site, names in parts.items() if "norm" in names)
        self.ways = {site: _way(names) for site, names in parts.items() if site not in self.norms}
        self.mask = table.mask(self.ways)
        self.biased = table.mask(site for site, way in self.ways.items() if way == BIAS)

    def rows(self, address: int) -> torch.Tensor:
        """Rows of the site table, int64 [sites, COLUMNS], for a buffer at this address."""
        return self._offsets + self._present * address


class SlotLayouts:
    """The last MAX_LAYOUTS layouts of a bank, by the identity of their lists."""

    def __init__(self, table: SiteTable) -> None:
        self.table = table
        self._known: OrderedDict[tuple[int, int], SlotLayout] = OrderedDict()

    def of(self, pieces: list[TensorPiece], item: int) -> SlotLayout:
        """The layout of a buffer of these pieces, in numbers of `item` bytes."""
        key = (id(pieces), item)
        known = self._known.get(key)
        if known is None:
            known = self._known[key] = SlotLayout(pieces, self.table, item)
            if len(self._known) > MAX_LAYOUTS:
                self._known.popitem(last=False)
        self._known.move_to_end(key)
        return known


class LoadedSlot:
    """An adapter in a slot: its buffer, layout and, for code that runs without tables, its deltas."""

    def __init__(self, flat: torch.Tensor, layout: SlotLayout, *, aligned: bool) -> None:
        self.flat = flat
        self.layout = layout
        self.aligned = aligned  # GPU kernels need each piece aligned

    @cached_property
    def deltas(self) -> dict[str, AffineDelta]:
        return deltas_of(self.flat, self.layout.pieces, aligned=self.aligned)


def deltas_of(
    flat: torch.Tensor, pieces: list[TensorPiece], *, aligned: bool = False
) -> dict[str, AffineDelta]:
    """Deltas by site: views of the flat buffer [n], or copies where `aligned` asks for them."""
    sizes = [prod(piece.shape) for piece in pieces]
    # one split, so that in training the gradients come back as one concatenation
    views = gpu.aligned(flat, sizes) if aligned else torch.split(flat, sizes)
    parts: dict[str, dict[str, Any]] = {}
    for piece, view in zip(pieces, views, strict=True):
        parts.setdefault(piece.site, {})[piece.part] = view.view(piece.shape)
    return {name: AffineDelta(name, **tensors) for name, tensors in parts.items()}


def _way(parts: set[str]) -> int:
    if "b" in parts:
        return MATRICES
    return SCALE if "gain" in parts else BIAS
