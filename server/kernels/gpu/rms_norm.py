"""x / sqrt(mean(x^2) + epsilon) * weight, each row read and written once; torch launches seven kernels."""

import torch
import triton
import triton.language as tl

from server.kernels.gpu.common import DTYPES


@triton.jit
def _rms_norm(  # type: ignore[no-untyped-def]
    x,
    weight,
    y,
    x_stride,
    epsilon,
    WIDTH: tl.constexpr,
    WIDE: tl.constexpr,  # WIDTH up to a power of two
    AROUND_ONE: tl.constexpr,
    DTYPE: tl.constexpr,
):
    row = tl.program_id(0)
    column = tl.arange(0, WIDE)
    inside = column < WIDTH
    normed = tl.load(x + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    normed = normed * tl.rsqrt(tl.sum(normed * normed, 0) / WIDTH + epsilon)
    gain = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    if AROUND_ONE:
        normed = normed * (1 + gain)
    else:  # rounded before the weight, as Llama's is
        normed = normed.to(DTYPE).to(tl.float32) * gain
    tl.store(y + row * WIDTH + column, normed.to(DTYPE), mask=inside)


def rms_norm(
    x: torch.Tensor,  # [..., width]
    weight: torch.Tensor,  # [width], x's dtype
    epsilon: float,
    *,
    around_one: bool,  # the gain is 1 + weight, as in Gemma
) -> torch.Tensor:
    """The norm [..., width] of x."""
    flat = x.reshape(-1, x.shape[-1])
    y = torch.empty_like(flat, memory_format=torch.contiguous_format)
    width = flat.shape[1]
    if flat.shape[0]:
        _rms_norm[(flat.shape[0],)](
            *(flat, weight, y, flat.stride(0), epsilon),
            WIDTH=width,
            WIDE=triton.next_power_of_2(width),
            AROUND_ONE=around_one,
            DTYPE=DTYPES[x.dtype],
            num_warps=4 if width <= 2048 else 8,
        )
    return y.view(x.shape)


def rms_norm_reference(
    x: torch.Tensor, weight: torch.Tensor, epsilon: float, *, around_one: bool
) -> torch.Tensor:
    """Reference implementation, same arguments; also recognises the modules that `rms_norm` may replace."""
    normed = x.float()
    normed = normed * torch.rsqrt(normed.square().mean(-1, keepdim=True) + epsilon)
    if around_one:
        return (normed * (1 + weight.float())).to(x.dtype)
    return (normed.to(x.dtype).float() * weight.float()).to(x.dtype)
