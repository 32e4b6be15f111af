"""The operations between the linears of a Llama-like layer as autograd functions: one kernel forward, one
back.

Only inputs get gradients: norm weights are frozen, and adapters that change norms act on their outputs.
"""

from collections.abc import Callable
from typing import Any

import torch

from server.kernels.cpu.llama_ops import RmsNorm, rotate_, silu_times
from server.kernels.cpu.llama_ops_backward import norm_gradient, silu_times_gradients

Tensor = torch.Tensor


class _Norm(torch.autograd.Function):
    """RMS norm of x [T, n], contiguous."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, norm: RmsNorm) -> Tensor:
        ctx.save_for_backward(x)
        ctx.norm = norm
        return norm(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return norm_gradient(ctx.norm, x, grad.contiguous()), None


class _NormOfSum(torch.autograd.Function):
    """(x + added, its RMS norm), all [T, n] and contiguous."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, added: Tensor, norm: RmsNorm) -> tuple[Tensor, Tensor]:
        total, y = norm.of_sum(x, added)
        ctx.save_for_backward(total)
        ctx.norm = norm
        return total, y

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        (total,) = ctx.saved_tensors
        grad_sum = norm_gradient(ctx.norm, total, grad.contiguous(), grad_total.contiguous())
        return grad_sum, grad_sum, None


class _Rotated(torch.autograd.Function):
    """Rotary embedding of x [T, heads, head_dim]; cos and sin [T, head_dim]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotated(grad, cos, -sin), None, None


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
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
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        return silu_times_gradients(gate, up, grad.contiguous())


# torch has no types for them
norm: Callable[[Tensor, RmsNorm], Tensor] = _Norm.apply
norm_of_sum: Callable[[Tensor, Tensor, RmsNorm], tuple[Tensor, Tensor]] = _NormOfSum.apply
rotated: Callable[[Tensor, Tensor, Tensor], Tensor] = _Rotated.apply
gated: Callable[[Tensor, Tensor], Tensor] = _SiluTimes.apply
