"""Sites that are not linears: norms, and the outputs of a decoder layer's attention and MLP.

Both are forward hooks on transformers' own modules. A norm's output goes to the banks as a linear's does. The
norm before a sub-block receives the residual stream r; the sub-block's output h goes to the banks together
with it. Sub-block sites are named by their path, e.g. "model.layers.0.mlp".

A hooked module keeps its hook and its site (`hook_of`, `site_of`), for code that runs layers without calling
their modules: cpu/decoder_layers.py.
"""

from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import nn

from server.adapters.methods.interface import NormParts
from server.adapters.sites import Site
from server.base_model.families import HEAD_NORMS, layer_with, norm_epsilon
from server.engine.model.forward_context import ForwardContext
from server.engine.model.module_kinds import input_width, kind_of
from server.engine.model.module_tokens import SeenTokens

# (module, its inputs, its output, changed in place)
Hook = Callable[[nn.Module, Any, Any], None]


def hook_norms(model: nn.Module, step: ForwardContext, seen: Mapping[str, SeenTokens]) -> dict[str, Site]:
    """Hook every norm that sees tokens: {site name: site}. Norms of single heads get no hook."""
    sites = {}
    for name, norm in norms_of(model):
        bias, width = getattr(norm, "bias", None), input_width(norm)
        site = Site(name, "norm", width, width, bias is not None, epsilon=norm_epsilon(norm) or 0.0)
        of_heads = name.endswith(HEAD_NORMS)
        if of_heads or name in seen:
            sites[name] = site
        if name in seen and not of_heads:
            at_head = seen[name] == "logits"
            _hook(norm, site, norm_hook(site, bias, norm_parts(norm), step, at_head=at_head))
    return sites


def norms_of(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """All norms of a model, by name."""
    return ((name, module) for name, module in model.named_modules() if kind_of(module) == "norm")


@torch.no_grad()
def norm_gains(model: nn.Module, seen: Mapping[str, SeenTokens]) -> dict[str, torch.Tensor]:
    """The factors [width] each norm multiplies by, by site name: its weight, or weight + 1 as in Gemma."""
    gains = {}
    for name, norm in norms_of(model):
        if name not in seen:
            continue
        weight, bias = norm.weight, getattr(norm, "bias", None)
        signs = torch.ones_like(weight)
        signs[1::2] = -1  # mean 0, mean square 1: every kind of norm keeps its value
        gain = (norm(signs) - (0 if bias is None else bias)) * signs
        gains[name] = weight + 1 if (gain - weight).mean() > 0.5 else weight
    return gains


def hook_sublayers(model: nn.Module, layers: int, hidden_size: int, step: ForwardContext) -> dict[str, Site]:
    """Hook the sub-blocks of all `layers` decoder layers: {site name: site}.

    A layer gets no hooks if its norms are not before its sub-blocks, or if its sub-blocks share one norm.
    """
    sites = {}
    for path, layer in decoder_layers(model, layers):
        known = layer_with(name for name, _ in layer.named_children())
        blocks = known.blocks if known else {}
        if not all(hasattr(layer, block.name) for block in blocks.values()):
            continue
        for kind, block in blocks.items():
            site = Site(f"{path}.{block.name}", kind, hidden_size, hidden_size, False)
            sites[site.name] = site
            getattr(layer, block.norm_before).register_forward_pre_hook(residual_hook(step))
            _hook(getattr(layer, block.name), site, sublayer_hook(site, step))
    return sites


def _hook(module: Any, site: Site, hook: Hook) -> None:
    module.register_forward_hook(hook)
    module.polypeft_hook, module.polypeft_site = hook, site


def hook_of(module: Any) -> Hook:
    """What runs after a hooked norm, attention or MLP: called with the module, its inputs and its output."""
    hook: Hook = module.polypeft_hook
    return hook


def site_of(module: Any) -> Site:
    """The site of a hooked module."""
    site: Site = module.polypeft_site
    return site


def decoder_layers(model: nn.Module, count: int) -> Iterator[tuple[str, nn.Module]]:
    """(path, layer) of the model's `count` decoder layers: the first ModuleList of that length."""
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            yield from ((f"{path}.{i}", layer) for i, layer in enumerate(module))
            return


@torch.no_grad()
def norm_parts(norm: Any) -> NormParts:
    """A function of x that splits the norm into (part without the weight, part the weight multiplies).

    Computed by two copies of the norm, with weights 0 and 1: a norm of any class is linear in its weight.
    """
    zero, one = deepcopy(norm), deepcopy(norm)
    for copy, weight in ((zero, 0.0), (one, 1.0)):
        for parameter in copy.parameters():
            parameter.zero_()
        copy.weight.fill_(weight)

    def parts(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        fixed = zero(x)
        return fixed, one(x) - fixed

    return parts


def norm_hook(
    site: Site, bias: torch.Tensor | None, parts: NormParts, step: ForwardContext, *, at_head: bool
) -> Hook:
    """A forward hook that lets the banks change a norm's output [..., width].

    `at_head`: the norm sees the tokens that get logits, not all.
    """

    def after_norm(_norm: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        affine, norm = (step.head_affine, step.head_norm) if at_head else (step.affine, step.norm)
        if not affine and not norm:
            return
        x, y = args[0].view(-1, site.outputs), output.view(-1, site.outputs)
        for bank, rows in norm:
            bank.norm(site, parts, x, y, rows)
        for bank, rows in affine:
            bank.affine(site, x, y, rows, bias)

    return after_norm


def residual_hook(step: ForwardContext) -> Any:
    """A forward pre-hook that notes the norm's input, the residual stream, in the context."""

    def before_norm(_norm: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        step.residual = args[0]

    return before_norm


def sublayer_hook(site: Site, step: ForwardContext) -> Hook:
    """A forward hook that lets the banks change a sub-block's output [..., hidden]."""

    def after_block(_block: nn.Module, _args: Any, output: Any) -> None:
        if not step.sublayer:
            return
        h = output[0] if isinstance(output, tuple) else output
        flat, residual = h.view(-1, site.outputs), step.residual.view(-1, site.outputs)
        for bank, rows in step.sublayer:
            bank.sublayer(site, flat, residual, rows)

    return after_block
