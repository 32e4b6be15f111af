"""On a GPU: linears that see the same x as one product, their adapters in one launch; norms and rotary
embeddings in one each.

Classes stay as transformers has them: a linear that is asked for its columns finds them computed already; a
norm whose outputs are an RMSNorm's, and an attention that rotates halves, get another `forward` as objects.
"""

from collections.abc import Callable, Sequence
from functools import partial
from types import FunctionType, MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from server.engine.model.linear_sites import SIBLINGS, FusedLinears, LinearSite

Rotary = Callable[..., tuple[torch.Tensor, torch.Tensor]]  # (q, k, cos, sin, unsqueeze_dim=1)


class FusedFamily(FusedLinears):
    """Plain weights of one module's linears, one below the other; each member holds its rows as a view."""

    def __init__(self, members: Sequence[LinearSite]) -> None:
        self.weight = torch.cat([member.held for member in members])
        self.bias: torch.Tensor | None = None
        if any(member.bias is not None for member in members):
            self.bias = self.weight.new_zeros(self.weight.shape[0])
        columns, at = [], 0
        for member in members:
            columns.append(slice(at, at + member.site.outputs))
            at = columns[-1].stop
            member.held = self.weight[columns[-1]]
            if self.bias is not None and member.bias is not None:
                self.bias[columns[-1]] = member.bias
        self.adopt(members, columns)

    def product(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight, self.bias)


def fuse_siblings(model: nn.Module) -> None:
    """Let linears that see the same input be one."""
    for module in model.modules():
        for names in SIBLINGS:
            found = [getattr(module, name, None) for name in names]
            members = [member for member in found if isinstance(member, LinearSite) and not member.fast]
            if len(members) == len(names):
                FusedFamily(members)


@torch.inference_mode()
def fuse_norms(model: nn.Module) -> int:
    """Let every RMSNorm be one launch; how many there are. Which modules are such, their own outputs tell."""
    from server.kernels.gpu.rms_norm import rms_norm  # Triton is not everywhere

    count = 0
    for module in model.modules():
        kind = rms_norm_of(module)
        if kind is not None:
            weight, epsilon, around_one = kind
            fused: Callable[[torch.Tensor], torch.Tensor] = partial(
                rms_norm, weight=weight, epsilon=epsilon, around_one=around_one
            )
            module.forward = fused  # hooks stay: they are called around it
            count += 1
    return count


def rms_norm_of(module: Any) -> tuple[torch.Tensor, float, bool] | None:
    """(weight, epsilon, whether the weight is around one) of an RMSNorm, whatever its class; else None."""
    from server.kernels.gpu.rms_norm import rms_norm_reference

    weight = getattr(module, "weight", None)
    epsilon = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not isinstance(weight, nn.Parameter) or weight.dim() != 1 or not isinstance(epsilon, float):
        return None
    if getattr(module, "bias", None) is not None:
        return None
    rng = torch.Generator(weight.device).manual_seed(0)
    x = torch.randn(8, weight.shape[0], generator=rng, device=weight.device).to(weight.dtype)
    x[4:] *= 1e-3  # so small that epsilon counts
    expected = module(x)
    for around_one in (False, True):
        twin = rms_norm_reference(x, weight, epsilon, around_one=around_one)
        if expected.dtype == x.dtype and torch.allclose(twin, expected, rtol=2e-2, atol=1e-3):
            return weight.data, epsilon, around_one
    return None


RENAMES = "transformers.utils.deprecation"  # its decorators only take arguments by their former names
ROTARY = "apply_rotary_pos_emb"  # what transformers' attention classes call, out of their own modules


def fuse_rotary(model: nn.Module) -> int:
    """Let attention modules rotate queries and keys in one launch; how many there are.

    Their `forward` stays, line by line: a copy of it is bound to the module, to which the name ROTARY means
    ours. The class, its module and other models of it know nothing of that.
    """
    count = 0
    for module in model.modules():
        forward: Any = type(module).forward
        if getattr(forward, "__globals__", {}).get("__name__") == RENAMES:
            forward = forward.__wrapped__
        if not isinstance(forward, FunctionType) or ROTARY not in forward.__code__.co_names:
            continue
        if not rotates_halves(forward.__globals__[ROTARY]):
            continue
        names = forward.__globals__ | {ROTARY: rotary_like(forward.__globals__[ROTARY])}
        copied = FunctionType(
            forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__
        )
        copied.__kwdefaults__ = forward.__kwdefaults__
        module.forward = MethodType(copied, module)
        count += 1
    return count


def rotary_like(original: Rotary) -> Rotary:
    """Ours where it does the same as the original, else the original."""
    from server.kernels.gpu.rotary import rotate

    def apply_rotary_pos_emb(
        q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, unsqueeze_dim: int = 1
    ) -> tuple[torch.Tensor, torch.Tensor]:
        whole = cos.shape == (1, q.shape[2], q.shape[3]) and q.shape[0] == 1 and unsqueeze_dim == 1
        if not whole or q.stride(3) != 1 or k.stride(3) != 1:
            return original(q, k, cos, sin, unsqueeze_dim)
        return rotate(q, k, cos, sin)

    return apply_rotary_pos_emb


@torch.inference_mode()
def rotates_halves(original: Rotary) -> bool:
    """Whether a function gives what ours gives."""
    from server.kernels.gpu.rotary import rotate_reference

    rng = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, heads, 5, 8, generator=rng) for heads in (4, 2))
    cos, sin = (torch.randn(1, 5, 8, generator=rng) for _ in range(2))
    try:
        found = original(q, k, cos, sin)
        torch.testing.assert_close(tuple(found), rotate_reference(q, k, cos, sin))
    except (TypeError, RuntimeError, IndexError, AssertionError):  # it takes, or gives, something else
        return False
    return True
