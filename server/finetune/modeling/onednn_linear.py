"""The base's linears as training multiplies them: by weights that oneDNN has laid out, once for each way.

Forward asks for x W^T, backward for the gradient upon x, which is g W. With the weight laid out for either,
oneDNN comes within a tenth of what the cores can do, where MKL on the plain weight reaches four fifths.
Two copies of the base are the price, so only a base that is small beside this machine's memory gets them.
"""

from typing import Any

import torch
from torch import nn

from server.engine.model.linear_sites import LinearSite
from server.memory import machine_bytes

MEMORY_DIVISOR = 6  # of the machine's memory, one in so many bytes may go to the copies

_ops: Any = torch.ops.mkldnn  # torch has no types for them
_mkldnn: Any = torch.backends.mkldnn


def pack_weights(model: nn.Module) -> None:
    """Put a `OneDnnLinear` in the place of every linear site, if this machine can have them."""
    found = {name: m for name, m in model.named_modules() if isinstance(m, LinearSite)}
    weights = [site.weight for site in found.values()]
    plain = any(w.device.type != "cpu" or w.dtype != torch.float32 for w in weights)
    if plain or not _mkldnn.is_available():
        return
    if 2 * sum(w.nbytes for w in weights) > machine_bytes() // MEMORY_DIVISOR:
        return
    for name, site in found.items():
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, OneDnnLinear(site))


class OneDnnLinear(nn.Module):
    """What the site does, with gradients: y = x W^T + b, then the banks. x is [..., in]."""

    def __init__(self, linear: LinearSite) -> None:
        super().__init__()
        self.site = linear.site
        self.step = linear.step
        self.is_head = linear.is_head
        self.bias = linear.bias
        weight = linear.weight
        self.forth = _ops._reorder_linear_weight(weight.contiguous())  # noqa: SLF001 - has no public name
        self.back = _ops._reorder_linear_weight(weight.T.contiguous())  # noqa: SLF001

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert not self.step.inputs, "no method that trains scales a linear's inputs"
        flat = x.reshape(-1, self.site.inputs)
        multiply: Any = _Product.apply
        y: torch.Tensor = multiply(flat, self.forth, self.back, self.bias)
        for bank, rows in self.step.head if self.is_head else self.step.affine:
            bank.affine(self.site, flat, y, rows, self.bias)
        return y.view(*x.shape[:-1], self.site.outputs)


class _Product(torch.autograd.Function):
    """x W^T + b, where only x may want a gradient."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, forth: torch.Tensor, back: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        ctx.back = back
        return _multiply(x, forth, bias)

    @staticmethod
    def backward(ctx: Any, upon: torch.Tensor) -> tuple[torch.Tensor | None, None, None, None]:
        wanted = ctx.needs_input_grad[0]
        return _multiply(upon, ctx.back) if wanted else None, None, None, None


def _multiply(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    y: torch.Tensor = _ops._linear_pointwise(x.contiguous(), weight, bias, "none", [], "")  # noqa: SLF001
    return y
