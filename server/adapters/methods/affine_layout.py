"""What the layout of an affine adapter comes to.

A LoRA has hundreds of pieces, and to look at each takes the engine's thread a millisecond or more, each time
an adapter comes into a slot. The loader gives one layout to all that were made alike (parse_cache.py), and
what that comes to is remembered.
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
    """What an adapter does at one site; absent parts do nothing.

    a [r, in] (of an embedding [vocabulary, r], so that a token's row is contiguous), b [r, out],
    gain [out], bias [out]. scale [in], upon the inputs, is for banks that have the hook for it.
    norm [1 or 2, out]: a norm's own weight, and its bias if it has one, in the place of the base's.
    Until it is packed b may lack a `factor`; in a bank all scalings are folded in. Matrices may be narrower
    than what they are multiplied with.
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
MAX_LAYOUTS = 64  # layouts


class TensorPiece(msgspec.Struct, frozen=True, gc=False):  # by the hundred thousand, and no cycle
    """One tensor of a change; in the flat buffer they lie back to back, in order."""

    site: str
    part: str
    shape: tuple[int, ...]


class SlotLayout:
    """`ways`: how each site is changed. `mask`: bits of these sites; `biased`: of those by a bias alone.

    `norms`: the norms that have other parameters, and are in none of these.
    """

    def __init__(self, layout: list[TensorPiece], table: SiteTable, item: int) -> None:
        self.layout = layout  # held, so that nothing else gets its id
        parts: dict[str, set[str]] = {}
        self.rank, begin = 0, 0
        offsets = np.zeros((len(table.names), kernel.COLUMNS), dtype=np.int64)
        present = np.zeros_like(offsets)
        for piece in layout:
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
        self.norms = frozenset(site for site, own in parts.items() if "norm" in own)
        self.ways = {site: _way(own) for site, own in parts.items() if site not in self.norms}
        self.mask = table.mask(self.ways)
        self.biased = table.mask(site for site, way in self.ways.items() if way == BIAS)

    def rows(self, address: int) -> torch.Tensor:
        """The table's, int64 [sites, COLUMNS], of a buffer that begins there."""
        return self._offsets + self._present * address


class SlotLayouts:
    """Of a bank's adapters; those of the last layouts are remembered."""

    def __init__(self, table: SiteTable) -> None:
        self.table = table
        self._known: OrderedDict[tuple[int, int], SlotLayout] = OrderedDict()

    def of(self, layout: list[TensorPiece], item: int) -> SlotLayout:
        """Of a buffer of numbers of `item` bytes."""
        key = (id(layout), item)
        found = self._known.get(key)
        if found is None:
            found = self._known[key] = SlotLayout(layout, self.table, item)
            if len(self._known) > MAX_LAYOUTS:
                self._known.popitem(last=False)
        self._known.move_to_end(key)
        return found


class LoadedSlot:
    """An adapter in a slot."""

    def __init__(self, flat: torch.Tensor, anatomy: SlotLayout, *, aligned: bool) -> None:
        self.flat = flat
        self.anatomy = anatomy
        self.aligned = aligned  # each piece as a GPU's kernels want it

    @cached_property
    def changes(self) -> dict[str, AffineDelta]:
        return deltas_of(self.flat, self.anatomy.layout, aligned=self.aligned)


def deltas_of(
    flat: torch.Tensor, layout: list[TensorPiece], *, aligned: bool = False
) -> dict[str, AffineDelta]:
    """By site: views of the buffer, or copies where these must be aligned."""
    sizes = [prod(piece.shape) for piece in layout]
    # one split, so that in training the gradients come back as one concatenation
    views = gpu.aligned(flat, sizes) if aligned else torch.split(flat, sizes)
    found: dict[str, dict[str, Any]] = {}
    for piece, view in zip(layout, views, strict=True):
        found.setdefault(piece.site, {})[piece.part] = view.view(piece.shape)
    return {name: AffineDelta(name, **parts) for name, parts in found.items()}


def _way(parts: set[str]) -> int:
    if "b" in parts:
        return MATRICES
    return SCALE if "gain" in parts else BIAS
