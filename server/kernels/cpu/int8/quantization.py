"""Numbers as int8: the rules that the linears of this folder share."""

import torch

MAX_INT8 = 127  # largest weight, and largest input of 8 bits. For the latter (vnni_linear.py):
GROUP_INPUTS = 64  # inputs that share a scale, set by their largest
MIN_GROUP_MAX = 1e-30  # a group whose largest is smaller is taken for zeros
UNSIGNED_OFFSET = 128  # added to weights that are stored unsigned
MAX_INT32 = (1 << 31) - 1
BFLOAT16_ERROR = 2.0**-8  # largest relative rounding error of bfloat16


def quantize(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(int8 [out, in], float32 scales [out]): symmetric, by output."""
    scales = (weight.abs().amax(1) / MAX_INT8).clamp_(min=torch.finfo(torch.float32).tiny)
    return (weight / scales[:, None]).round_().to(torch.int8), scales


def is_dequantised(dequantised: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether `dequantised` [out, in] may be `weight` after int8; `weight` may be rounded to bfloat16."""
    step = dequantised.abs().amax(1, keepdim=True) / MAX_INT8
    error = (weight.float() - dequantised).abs()
    return bool((error <= 0.51 * step + dequantised.abs() * BFLOAT16_ERROR).all())


def max_quantized_input(inputs: int) -> int:
    """The largest integer an input may become, so that no sum overflows 32 bits."""
    return min(32767, MAX_INT32 // (MAX_INT8 * inputs))
