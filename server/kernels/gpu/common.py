"""Shared by the Triton kernels: torch's dtypes as Triton's, and a program's tokens."""

import torch
import triton
import triton.language as tl

from server.kernels import token_blocks as gpu

DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
FIELDS = tl.constexpr(gpu.BLOCK_FIELDS)
STEP = tl.constexpr(gpu.RANK_STEP)
MIN_SPLIT_WIDTH = 1024  # of inputs in a split
MAX_SPLITS = 8


@triton.jit
def members(blocks, order, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Of this program's block, each [BLOCK]: indices in the order, the tokens there, and a mask of valid
    ones.
    """
    block = blocks + tl.program_id(0) * FIELDS
    first, count = tl.load(block + 1), tl.load(block + 2)
    place = tl.arange(0, BLOCK)
    tokens = tl.load(order + first + place, mask=place < count, other=0)
    return first + place, tokens, place < count


@triton.jit
def summed(  # type: ignore[no-untyped-def]
    parts, n, places, valid, columns, WIDTH: tl.constexpr, SPLITS: tl.constexpr
):
    """Float32 parts [SPLITS, n, WIDTH] summed over the splits, at these rows `places` and columns."""
    total = tl.zeros((places.shape[0], columns.shape[0]), tl.float32)
    for split in tl.static_range(SPLITS):
        at = parts + (split * n + places)[:, None] * WIDTH + columns[None, :]
        total += tl.load(at, mask=valid[:, None], other=0.0)
    return total


def splits_of(width: int) -> int:
    """Into how many programs the sums over inputs of this width are split; `summed` adds their results."""
    return min(MAX_SPLITS, -(-width // MIN_SPLIT_WIDTH))


INTERPRETED = not isinstance(members, triton.JITFunction)


def dot_type(dtype: torch.dtype) -> tl.dtype:
    """The type of a product's factors: `dtype`, but float32 for the interpreter, which multiplies the bits of
    a bfloat16.
    """
    return tl.float32 if INTERPRETED else DTYPES[dtype]
