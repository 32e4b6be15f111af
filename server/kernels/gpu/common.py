"""What the Triton kernels share: torch's dtypes as Triton's, and how a program finds its tokens."""

import torch
import triton
import triton.language as tl

from server.kernels import token_blocks as gpu

DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
FIELDS = tl.constexpr(gpu.FIELDS)
STEP = tl.constexpr(gpu.RANK_STEP)


@triton.jit
def members(blocks, order, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """A block's places in the order, the tokens there, and which of them there are: each [BLOCK]."""
    block = blocks + tl.program_id(0) * FIELDS
    first, count = tl.load(block + 1), tl.load(block + 2)
    place = tl.arange(0, BLOCK)
    tokens = tl.load(order + first + place, mask=place < count, other=0)
    return first + place, tokens, place < count


@triton.jit
def summed(  # type: ignore[no-untyped-def]
    parts, n, places, held, columns, WIDTH: tl.constexpr, SPLITS: tl.constexpr
):
    """The sums over all splits of float32 parts [SPLITS, n, WIDTH], at these places and columns."""
    total = tl.zeros((places.shape[0], columns.shape[0]), tl.float32)
    for split in tl.static_range(SPLITS):
        at = parts + (split * n + places)[:, None] * WIDTH + columns[None, :]
        total += tl.load(at, mask=held[:, None], other=0.0)
    return total


INTERPRETED = not isinstance(members, triton.JITFunction)


def dot_type(dtype: torch.dtype) -> tl.dtype:
    """What a product's factors are given as: their own type, but for the interpreter, which multiplies the
    bits of a bfloat16.
    """
    return tl.float32 if INTERPRETED else DTYPES[dtype]
