"""The base's linears in training, with weights packed by oneDNN: one copy for forward, one for backward.

Forward computes x W^T, backward the gradient with respect to x, g W. With a weight packed for each, oneDNN
comes within a tenth of the cores' peak; MKL on the plain weight reaches four fifths. It takes two more copies
of the base, so only a base that is small compared with this machine's memory gets them.
"""

from typing import Any

import torch
from torch import nn

from server.engine.model.linear_sites import LinearSite
from server.memory import machine_bytes

MEMORY_DIVISOR = 6  # the copies may take 1/6 of the machine's memory

_ops: Any = torch.ops.mkldnn  # torch has no types for them
_mkldnn: Any = torch.backends.mkldnn


def pack_weights(model: nn.Module) -> None:
    """Replace every linear site by a `OneDnnLinear`, if oneDNN and enough memory are there."""
    sites = {name: m for name, m in model.named_modules() if isinstance(m, LinearSite)}
    weights = [site.weight for site in sites.values()]
    unsupported = any(w.device.type != "cpu" or w.dtype != torch.float32 for w in weights)
    if unsupported or not _mkldnn.is_available():
        return
    if 2 * sum(w.nbytes for w in weights) > machine_bytes() // MEMORY_DIVISOR:
        return
    for name, site in sites.items():
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, OneDnnLinear(site))


class OneDnnLinear(nn.Module):
    """A linear site with gradients: y = x W^T + b, then the banks' deltas; x [..., in], y [..., out]."""

    def __init__(self, linear: LinearSite) -> None:
        super().__init__()
        self.site = linear.site
        self.step = linear.step
        self.is_head = linear.is_head
        self.bias = linear.bias
        weight = linear.weight
        self.forward_weight = _ops._reorder_linear_weight(weight.contiguous())  # noqa: SLF001 - no public name
        self.backward_weight = _ops._reorder_linear_weight(weight.T.contiguous())  # noqa: SLF001

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert not self.step.inputs, "no method that trains scales a linear's inputs"
        flat = x.reshape(-1, self.site.inputs)
        multiply: Any = _Product.apply
        y: torch.Tensor = multiply(flat, self.forward_weight, self.backward_weight, self.bias)
        for bank, rows in self.step.head_affine if self.is_head else self.step.affine:
            bank.affine(self.site, flat, y, rows, self.bias)
        return y.view(*x.shape[:-1], self.site.outputs)


class _Product(torch.autograd.Function):
    """x W^T + b for x [T, in]; only x may get a gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        forward_weight: torch.Tensor,
        backward_weight: torch.Tensor,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        ctx.backward_weight = backward_weight
        return _multiply(x, forward_weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, None, None, None]:
        needed = ctx.needs_input_grad[0]
        return _multiply(grad, ctx.backward_weight) if needed else None, None, None, None


def _multiply(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    y: torch.Tensor = _ops._linear_pointwise(x.contiguous(), weight, bias, "none", [], "")  # noqa: SLF001
    return y
