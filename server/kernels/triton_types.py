"""Torch's dtypes as Triton's, and in which one tensor cores are fed."""

import torch
import triton
import triton.language as tl

DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def _nothing() -> None:
    """Compiled or interpreted, as all kernels of this process are."""


INTERPRETED = not isinstance(_nothing, triton.JITFunction)


def dot_type(dtype: torch.dtype) -> tl.dtype:
    """What a product's factors are given as: their own type, but for the interpreter, which multiplies the
    bits of a bfloat16.
    """
    return tl.float32 if INTERPRETED else DTYPES[dtype]
