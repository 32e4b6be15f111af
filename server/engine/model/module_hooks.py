"""Sites that are no linear: norms, and the outputs of a decoder layer's attention and MLP.

Hooks on transformers' own modules. A norm's output is handed to the banks as a linear's is. The norm before
a sub-block shows the residual stream r; the sub-block's output h is handed to the banks together with it.
Sub-block sites are named by their path, e.g. "model.layers.0.mlp".
"""

from collections.abc import Iterator, Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import nn

from server.adapters.methods.interface import NormParts
from server.adapters.sites import INNER_NORMS, Site, SiteKind
from server.engine.model.forward_context import ForwardContext
from server.engine.model.module_tokens import Seen, norm_width

Blocks = tuple[tuple[str, SiteKind, str], ...]  # (sub-block, kind, the norm before it)

# How a layer is built, told by the norms it has.
LAYERS: dict[frozenset[str], Blocks] = {
    frozenset({"ln_1", "ln_2"}): (
        ("attn", "attention", "ln_1"),
        ("mlp", "mlp", "ln_2"),
    ),
    frozenset({"input_layernorm", "post_attention_layernorm"}): (
        ("self_attn", "attention", "input_layernorm"),
        ("mlp", "mlp", "post_attention_layernorm"),
    ),
    frozenset(
        {
            "input_layernorm",
            "post_attention_layernorm",
            "pre_feedforward_layernorm",
            "post_feedforward_layernorm",
        }
    ): (
        ("self_attn", "attention", "input_layernorm"),
        ("mlp", "mlp", "pre_feedforward_layernorm"),
    ),
}


def watch_norms(model: nn.Module, step: ForwardContext, seen: Mapping[str, Seen]) -> dict[str, Site]:
    """Hook every norm that sees tokens; {site name: site}. Those that see single heads get no hook."""
    sites = {}
    for name, norm in norms_of(model):
        bias, width = getattr(norm, "bias", None), norm_width(norm)
        epsilon = getattr(norm, "eps", getattr(norm, "variance_epsilon", 0.0))
        site = Site(name, "norm", width, width, bias is not None, epsilon=epsilon)
        inner = name.endswith(INNER_NORMS)
        if inner or name in seen:
            sites[name] = site
        if name in seen and not inner:
            kept = seen[name] == "kept"
            hook = norm.polypeft_after = apply_to_norm(site, bias, norm_parts(norm), step, kept=kept)
            norm.register_forward_hook(hook)
            norm.polypeft_site = site
    return sites


def norms_of(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """All norms of a model, by name."""
    return ((name, module) for name, module in model.named_modules() if norm_width(module))


@torch.no_grad()
def norm_gains(model: nn.Module, seen: Mapping[str, Seen]) -> dict[str, torch.Tensor]:
    """What each norm multiplies by, [width], by site name: its weight, or as Gemma has it, one more."""
    gains = {}
    for name, norm in norms_of(model):
        if name not in seen:
            continue
        weight, bias = norm.weight, getattr(norm, "bias", None)
        signs = torch.ones_like(weight)
        signs[1::2] = -1  # mean 0 and mean square 1: every kind of norm leaves it as it is
        gain = (norm(signs) - (0 if bias is None else bias)) * signs
        gains[name] = weight + 1 if (gain - weight).mean() > 0.5 else weight
    return gains


def watch_sublayers(model: nn.Module, layers: int, hidden_size: int, step: ForwardContext) -> dict[str, Site]:
    """Hook every decoder layer's sub-blocks; {site name: site}.

    A layer whose norms stand elsewhere than before its sub-blocks, or whose sub-blocks share one, gets none.
    """
    sites = {}
    for path, layer in decoder_layers(model, layers):
        norms = frozenset(name for name, _ in layer.named_children() if "norm" in name or "ln_" in name)
        blocks = LAYERS.get(norms, ())
        if not all(hasattr(layer, leaf) for leaf, _, _ in blocks):
            continue
        for leaf, kind, norm in blocks:
            site = Site(f"{path}.{leaf}", kind, hidden_size, hidden_size, False)
            sites[site.name] = site
            getattr(layer, norm).register_forward_pre_hook(keep_residual(step))
            block = getattr(layer, leaf)
            hook = block.polypeft_after = apply_banks(site, step)
            block.register_forward_hook(hook)
    return sites


def decoder_layers(model: nn.Module, count: int) -> Iterator[tuple[str, nn.Module]]:
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            yield from ((f"{path}.{i}", layer) for i, layer in enumerate(module))
            return


@torch.no_grad()
def norm_parts(norm: Any) -> NormParts:
    """How the norm depends on its weight, asked of twins of it: whatever its class, it is linear in that."""
    zero, one = deepcopy(norm), deepcopy(norm)
    for twin, weight in ((zero, 0.0), (one, 1.0)):
        for parameter in twin.parameters():
            parameter.zero_()
        twin.weight.fill_(weight)

    def parts(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        fixed = zero(x)
        return fixed, one(x) - fixed

    return parts


def apply_to_norm(
    site: Site, bias: torch.Tensor | None, parts: NormParts, step: ForwardContext, *, kept: bool
) -> Any:
    """`kept`: it sees the tokens that are sampled from."""

    def after_norm(_norm: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        affine, norm = (step.head, step.head_norm) if kept else (step.affine, step.norm)
        if not affine and not norm:
            return
        x, y = args[0].view(-1, site.outputs), output.view(-1, site.outputs)
        for bank, rows in norm:
            bank.norm(site, parts, x, y, rows)
        for bank, rows in affine:
            bank.affine(site, x, y, rows, bias)

    return after_norm


def keep_residual(step: ForwardContext) -> Any:
    def before_norm(_norm: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        step.residual = args[0]

    return before_norm


def apply_banks(site: Site, step: ForwardContext) -> Any:
    def after_block(_block: nn.Module, _args: Any, output: Any) -> None:
        if not step.sublayer:
            return
        h = output[0] if isinstance(output, tuple) else output
        flat, residual = h.view(-1, site.outputs), step.residual.view(-1, site.outputs)
        for bank, rows in step.sublayer:
            bank.sublayer(site, flat, residual, rows)

    return after_block
