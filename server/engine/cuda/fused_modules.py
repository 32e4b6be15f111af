"""On a GPU, fewer launches: linears that see the same x are one product with one launch for their adapters;
norms and rotary embeddings are one launch each.

transformers' classes stay unchanged. A linear site reads its columns of the fused product. A norm object
whose outputs equal an RMSNorm's, and an attention object that rotates halves, get another `forward`.
"""

from collections.abc import Callable, Sequence
from functools import partial
from types import FunctionType, MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from server.base_model.families import ROTARY_FUNCTION, SIBLINGS, norm_epsilon
from server.engine.model.linear_sites import FusedLinears, LinearSite

Rotary = Callable[..., tuple[torch.Tensor, torch.Tensor]]  # (q, k, cos, sin, unsqueeze_dim=1)


class FusedPlainLinears(FusedLinears):
    """The concatenated plain weights of one module's linears; each member's weight becomes a view of its
    rows.
    """

    def __init__(self, members: Sequence[LinearSite]) -> None:
        self.weight = torch.cat([member.plain_weight for member in members])
        self.bias: torch.Tensor | None = None
        if any(member.bias is not None for member in members):
            self.bias = self.weight.new_zeros(self.weight.shape[0])
        columns, start = [], 0
        for member in members:
            columns.append(slice(start, start + member.site.outputs))
            start = columns[-1].stop
            member.plain_weight = self.weight[columns[-1]]
            if self.bias is not None and member.bias is not None:
                self.bias[columns[-1]] = member.bias
        self.attach(members, columns)

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """[T, all outputs] of x [T, in]."""
        return F.linear(x, self.weight, self.bias)


def fuse_siblings(model: nn.Module) -> None:
    """Compute linears that see the same input as one product."""
    for module in model.modules():
        for names in SIBLINGS:
            siblings = [getattr(module, name, None) for name in names]
            members = [m for m in siblings if isinstance(m, LinearSite) and not m.packed]
            if len(members) == len(names):
                FusedPlainLinears(members)


@torch.inference_mode()
def fuse_norms(model: nn.Module) -> int:
    """Compute every RMSNorm, recognised by its outputs, in one launch; returns how many there are."""
    from server.kernels.gpu.rms_norm import rms_norm  # Triton is not everywhere

    count = 0
    for module in model.modules():
        kind = rms_norm_of(module)
        if kind is not None:
            weight, epsilon, around_one = kind
            fused: Callable[[torch.Tensor], torch.Tensor] = partial(
                rms_norm, weight=weight, epsilon=epsilon, around_one=around_one
            )
            module.forward = fused  # its hooks still run: they are called around it
            count += 1
    return count


def rms_norm_of(module: Any) -> tuple[torch.Tensor, float, bool] | None:
    """(weight [width], epsilon, whether the gain is 1 + weight) of a module whose outputs are an RMSNorm's.

    None for every other module.
    """
    from server.kernels.gpu.rms_norm import rms_norm_reference

    weight = getattr(module, "weight", None)
    epsilon = norm_epsilon(module)
    if not isinstance(weight, nn.Parameter) or weight.dim() != 1 or not isinstance(epsilon, float):
        return None
    if getattr(module, "bias", None) is not None:
        return None
    rng = torch.Generator(weight.device).manual_seed(0)
    x = torch.randn(8, weight.shape[0], generator=rng, device=weight.device).to(weight.dtype)
    x[4:] *= 1e-3  # so small that epsilon matters
    expected = module(x)
    for around_one in (False, True):
        reference = rms_norm_reference(x, weight, epsilon, around_one=around_one)
        if expected.dtype == x.dtype and torch.allclose(reference, expected, rtol=2e-2, atol=1e-3):
            return weight.data, epsilon, around_one
    return None


DEPRECATION = "transformers.utils.deprecation"  # its decorators only accept arguments by their former names


def fuse_rotary(model: nn.Module) -> int:
    """Let attention modules rotate queries and keys in one launch; returns how many there are.

    The code of their `forward` stays the same: a copy of the function is bound to the module object, with the
    global ROTARY_FUNCTION bound to our function. The class and other models of it are not affected.
    """
    count = 0
    for module in model.modules():
        forward: Any = type(module).forward
        if getattr(forward, "__globals__", {}).get("__name__") == DEPRECATION:
            forward = forward.__wrapped__
        if not isinstance(forward, FunctionType) or ROTARY_FUNCTION not in forward.__code__.co_names:
            continue
        original = forward.__globals__[ROTARY_FUNCTION]
        if not rotates_halves(original):
            continue
        other_globals = forward.__globals__ | {ROTARY_FUNCTION: rotary_like(original)}
        copied = FunctionType(
            forward.__code__, other_globals, forward.__name__, forward.__defaults__, forward.__closure__
        )
        copied.__kwdefaults__ = forward.__kwdefaults__
        module.forward = MethodType(copied, module)
        count += 1
    return count


def rotary_like(original: Rotary) -> Rotary:
    """A function that calls ours where it computes the same as the original, else the original."""
    from server.kernels.gpu.rotary import rotate

    def apply_rotary_pos_emb(
        q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, unsqueeze_dim: int = 1
    ) -> tuple[torch.Tensor, torch.Tensor]:
        whole_heads = cos.shape == (1, q.shape[2], q.shape[3]) and q.shape[0] == 1 and unsqueeze_dim == 1
        if not whole_heads or q.stride(3) != 1 or k.stride(3) != 1:
            return original(q, k, cos, sin, unsqueeze_dim)
        return rotate(q, k, cos, sin)

    return apply_rotary_pos_emb


@torch.inference_mode()
def rotates_halves(original: Rotary) -> bool:
    """Whether a rotary function computes the same as ours."""
    from server.kernels.gpu.rotary import rotate_reference

    rng = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, heads, 5, 8, generator=rng) for heads in (4, 2))
    cos, sin = (torch.randn(1, 5, 8, generator=rng) for _ in range(2))
    try:
        rotated = original(q, k, cos, sin)
        torch.testing.assert_close(tuple(rotated), rotate_reference(q, k, cos, sin))
    except (TypeError, RuntimeError, IndexError, AssertionError):  # it has other arguments or results
        return False
    return True
