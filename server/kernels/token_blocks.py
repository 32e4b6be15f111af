"""When Triton's kernels run, and what all of them share: how tokens are put into blocks.

Triton comes with torch's CUDA build; without it, and on every other device, the plain twins run. Under
Triton's interpreter (TRITON_INTERPRET=1) the same kernels run on a CPU's tensors: so they are tested.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import groupby
from operator import itemgetter

import torch

AVAILABLE = find_spec("triton") is not None
SMALL_BLOCK, LARGE_BLOCK = 16, 64  # tokens of a block: of rows that decode, and where some row has more
FIELDS = 3  # of a block: slot, its first place in the order, its count
RANK_STEP = 16  # ranks that a block of a kernel takes at a time: tensor cores want no fewer


def chosen(device: torch.device) -> bool:
    """Whether this device's tensors go through Triton."""
    return AVAILABLE and device.type == "cuda"


@dataclass(frozen=True)
class BlockPlan:
    """Tokens in blocks of one slot each, on the device. A block of slot 0 is left as soon as it is begun.

    order [n]: places of tokens in the batch; blocks [b, FIELDS]; `size`: tokens of a block at most;
    `ranks`: the highest rank or width among the slots, rounded up.
    """

    order: torch.Tensor  # int64
    blocks: torch.Tensor  # int64
    size: int
    ranks: int


def put_in_blocks(spans: Iterable[tuple[int, int, int]], size: int) -> tuple[list[int], list[int]]:
    """Tokens of spans (slot, start, end) in the order of their slots, and blocks as flat triples.

    Spans of one slot share blocks; there are at most as many blocks as tokens.
    """
    order: list[int] = []
    blocks: list[int] = []
    for slot, own in groupby(sorted(spans), key=itemgetter(0)):
        first = len(order)
        for _, start, end in own:
            order.extend(range(start, end))
        for at in range(first, len(order), size):
            blocks += [slot, at, min(size, len(order) - at)]
    return order, blocks


def round_up(ranks: int) -> int:
    """The next power of two, no less than a step: few sizes, so that few kernels are compiled."""
    return max(RANK_STEP, 1 << (ranks - 1).bit_length()) if ranks else RANK_STEP


def aligned(flat: torch.Tensor, sizes: Sequence[int]) -> list[torch.Tensor]:
    """The pieces of a flat buffer, each beginning at a multiple of 16 bytes, as the kernels' loads want it.

    Views of the buffer where that holds already, as of all models whose widths are multiples of 8.
    """
    step = 16 // flat.element_size()
    if flat.data_ptr() % 16 == 0 and all(size % step == 0 for size in sizes[:-1]):
        return list(torch.split(flat, list(sizes)))
    padded = [-(-size // step) * step for size in sizes]
    room = flat.new_zeros(sum(padded))
    places = [place[:size] for place, size in zip(torch.split(room, padded), sizes, strict=True)]
    for place, piece in zip(places, torch.split(flat, list(sizes)), strict=True):
        place.copy_(piece)
    return places
