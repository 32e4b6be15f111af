"""Rotary embedding of queries and keys in one launch, where torch needs ten.

Halves are rotated against each other: out = x * cos + (-x2, x1) * sin, for x = (x1, x2).
"""

import torch
import triton
import triton.language as tl

from server.kernels.gpu.common import DTYPES


@triton.jit
def _rotate(  # type: ignore[no-untyped-def]
    q,
    k,
    cos,  # [T, DIM]
    sin,
    q_out,  # [T, heads, DIM]
    k_out,
    q_token,
    q_head,
    k_token,
    k_head,
    table_token,
    HEADS: tl.constexpr,  # of queries; the programs after them are the keys'
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    WIDE: tl.constexpr,  # DIM / 2 up to a power of two
    DTYPE: tl.constexpr,
):
    token, head = tl.program_id(0), tl.program_id(1)
    if head < HEADS:
        x, out = q + token * q_token + head * q_head, q_out + (token * HEADS + head) * DIM
    else:
        head -= HEADS
        x, out = k + token * k_token + head * k_head, k_out + (token * KV_HEADS + head) * DIM
    half: tl.constexpr = DIM // 2
    d = tl.arange(0, WIDE)
    inside = d < half
    x1 = tl.load(x + d, mask=inside).to(tl.float32)
    x2 = tl.load(x + half + d, mask=inside).to(tl.float32)
    at = token * table_token + d
    cos1, cos2 = tl.load(cos + at, mask=inside), tl.load(cos + at + half, mask=inside)
    sin1, sin2 = tl.load(sin + at, mask=inside), tl.load(sin + at + half, mask=inside)
    low = x1 * cos1.to(tl.float32) - x2 * sin1.to(tl.float32)
    high = x2 * cos2.to(tl.float32) + x1 * sin2.to(tl.float32)
    tl.store(out + d, low.to(DTYPE), mask=inside)
    tl.store(out + half + d, high.to(DTYPE), mask=inside)


def rotate(
    q: torch.Tensor,  # [1, heads, T, dim]
    k: torch.Tensor,  # [1, kv_heads, T, dim]
    cos: torch.Tensor,  # [1, T, dim]
    sin: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """q and k rotated, of the same shapes: transposed views of [T, heads, dim]."""
    _, heads, tokens, dim = q.shape
    kv_heads = k.shape[1]
    q_out, k_out = q.new_empty(tokens, heads, dim), k.new_empty(tokens, kv_heads, dim)
    cos, sin = cos.contiguous(), sin.contiguous()
    if tokens:
        _rotate[tokens, heads + kv_heads](
            *(q, k, cos, sin, q_out, k_out),
            *(q.stride(2), q.stride(1), k.stride(2), k.stride(1), cos.stride(1)),
            HEADS=heads,
            KV_HEADS=kv_heads,
            DIM=dim,
            WIDE=triton.next_power_of_2(dim // 2),
            DTYPE=DTYPES[q.dtype],
            num_warps=1,
        )
    return q_out.transpose(0, 1)[None], k_out.transpose(0, 1)[None]


def rotate_reference(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Reference implementation, same arguments; also recognises the functions that `rotate` may replace."""
    cos, sin = cos[:, None], sin[:, None]

    def rotated(x: torch.Tensor) -> torch.Tensor:
        x1, x2 = x.chunk(2, -1)
        return x * cos + torch.cat((-x2, x1), -1) * sin

    return rotated(q), rotated(k)
