"""Token blocks, the unit of work of Triton's kernels; and where those kernels run.

Triton comes with torch's CUDA build; without it, and on every other device, the reference implementations
run. Under Triton's interpreter (TRITON_INTERPRET=1) the same kernels run on a CPU's tensors: so they are
tested.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import groupby
from operator import itemgetter

import torch

AVAILABLE = find_spec("triton") is not None
SMALL_BLOCK, LARGE_BLOCK = 16, 64  # tokens of a block: if all rows decode, and if some row has more tokens
BLOCK_FIELDS = 3  # of a block: slot, index of its first token in the order, number of tokens
RANK_STEP = 16  # ranks per product of a kernel: the minimum of tensor cores


def uses_triton(device: torch.device) -> bool:
    """Whether Triton's kernels run on this device."""
    return AVAILABLE and device.type == "cuda"


@dataclass(frozen=True)
class BlockPlan:
    """Tokens in blocks of one slot each, on the device. Kernels return at once from a block of slot 0."""

    order: torch.Tensor  # int64 [n]: indices of tokens in the batch, sorted by slot
    blocks: torch.Tensor  # int64 [blocks, BLOCK_FIELDS]
    size: int  # tokens of a block at most
    ranks: int  # the highest rank or width among the slots, rounded up


def put_in_blocks(spans: Iterable[tuple[int, int, int]], size: int) -> tuple[list[int], list[int]]:
    """(order, blocks) of tokens in spans (slot, start, end), both flat: see BlockPlan.

    Spans of one slot share blocks; there are at most as many blocks as tokens.
    """
    order: list[int] = []
    blocks: list[int] = []
    for slot, of_slot in groupby(sorted(spans), key=itemgetter(0)):
        first = len(order)
        for _, start, end in of_slot:
            order.extend(range(start, end))
        for begin in range(first, len(order), size):
            blocks += [slot, begin, min(size, len(order) - begin)]
    return order, blocks


def round_up(ranks: int) -> int:
    """The next power of two, at least RANK_STEP: few sizes, so that few kernels are compiled."""
    return max(RANK_STEP, 1 << (ranks - 1).bit_length()) if ranks else RANK_STEP


def aligned(flat: torch.Tensor, sizes: Sequence[int]) -> list[torch.Tensor]:
    """The pieces of a flat buffer, of these sizes, each at a multiple of 16 bytes as the kernels' loads need
    it.

    Views of the buffer where that holds already, as in all models whose widths are multiples of 8; else
    copies.
    """
    step = 16 // flat.element_size()
    if flat.data_ptr() % 16 == 0 and all(size % step == 0 for size in sizes[:-1]):
        return list(torch.split(flat, list(sizes)))
    padded = [-(-size // step) * step for size in sizes]
    buffer = flat.new_zeros(sum(padded))
    copies = [part[:size] for part, size in zip(torch.split(buffer, padded), sizes, strict=True)]
    for copy, piece in zip(copies, torch.split(flat, list(sizes)), strict=True):
        copy.copy_(piece)
    return copies
