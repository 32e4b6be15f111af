"""What stands between the linears of a Llama-like layer, with gradients: one kernel forward, one backward.

Gradients are upon inputs alone: no norm's weight is trained here, adapters that change norms act behind them.
"""

from collections.abc import Callable
from typing import Any

import torch

from server.kernels.cpu.llama_ops import RmsNorm, rotate_, silu_times
from server.kernels.cpu.llama_ops_backward import norm_gradient, silu_times_gradients

Tensor = torch.Tensor


class _Norm(torch.autograd.Function):
    """x [T, n], contiguous -> its norm."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, norm: RmsNorm) -> Tensor:
        ctx.save_for_backward(x)
        ctx.norm = norm
        return norm(x)

    @staticmethod
    def backward(ctx: Any, upon: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return norm_gradient(ctx.norm, x, upon.contiguous()), None


class _NormOfSum(torch.autograd.Function):
    """(x + added, the norm of that), all [T, n] and contiguous."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, added: Tensor, norm: RmsNorm) -> tuple[Tensor, Tensor]:
        total, y = norm.of_sum(x, added)
        ctx.save_for_backward(total)
        ctx.norm = norm
        return total, y

    @staticmethod
    def backward(ctx: Any, upon_total: Tensor, upon: Tensor) -> tuple[Tensor, Tensor, None]:
        (total,) = ctx.saved_tensors
        found = norm_gradient(ctx.norm, total, upon.contiguous(), upon_total.contiguous())
        return found, found, None


class _Turned(torch.autograd.Function):
    """x [T, heads, head_dim] under the rotary embedding."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, upon: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turn(upon, cos, -sin), None, None


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    y = x.clone(memory_format=torch.contiguous_format)
    rotate_(y, cos, sin)
    return y


class _SiluTimes(torch.autograd.Function):
    """silu(gate) * up, [T, n] and contiguous."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return silu_times(gate, up)

    @staticmethod
    def backward(ctx: Any, upon: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        return silu_times_gradients(gate, up, upon.contiguous())


# torch has no types for them
norm: Callable[[Tensor, RmsNorm], Tensor] = _Norm.apply
norm_of_sum: Callable[[Tensor, Tensor, RmsNorm], tuple[Tensor, Tensor]] = _NormOfSum.apply
rotated: Callable[[Tensor, Tensor, Tensor], Tensor] = _Turned.apply
gated: Callable[[Tensor, Tensor], Tensor] = _SiluTimes.apply
