"""Llama-like decoder layers run by our own CPU kernels: the same sites and the same sums in fewer calls.

transformers' classes define what a model computes. Layers that have the modules of a Llama layer are run here
instead, if the whole model's hidden states of a probe stay the same: a model that scales, caps or orders
things in its own way keeps its classes. At 16 rows half of a step's time was spent between the linears.

    r = x;  n = norm(r);  q, k, v = W n;  h = W attention(rotate(q), rotate(k), v)
    r = r + h;  n = norm(r);  x = r + W (silu(W n) * W n)

Steps of few tokens are one launch from the first layer to the last (recorded_steps.py): then the call of
layer 0 runs all layers, and the calls of the others return their input.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from server.base_model.families import HEAD_NORMS, LLAMA_ATTENTION, LLAMA_LAYER, LLAMA_MLP
from server.engine.cpu.recorded_steps import RecordedSteps
from server.engine.cpu.verified_swap import PROBE_TOKENS, probe_states, swap_forward_if_equal
from server.engine.model.forward_context import ForwardContext
from server.engine.model.linear_sites import FusedLinears, LinearSite, biases_of
from server.engine.model.module_hooks import decoder_layers, hook_of, site_of
from server.kernels.cpu.decode_attention import supports_pages
from server.kernels.cpu.fused_bias import Biases
from server.kernels.cpu.llama_ops import RmsNorm, add_, rotate_, silu_times
from server.kernels.cpu.packed_linear import without_rounding


class LayerParts:
    """The modules of a Llama-like layer. Its own class ran before, which recorded its attention options."""

    def __init__(self, layer: Any, step: ForwardContext) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.step = step
        self.index: int = attention.layer_idx
        self.attention, self.mlp = attention, mlp
        self.norms = (layer.input_layernorm, layer.post_attention_layernorm)
        self.fast_norms = [RmsNorm(norm.weight, norm.variance_epsilon) for norm in self.norms]
        self.head_norms = [
            RmsNorm(norm.weight, norm.variance_epsilon) if norm is not None else None
            for norm in (getattr(attention, name, None) for name in HEAD_NORMS)
        ]
        self.after_first_norm, self.after_second_norm = (hook_of(norm) for norm in self.norms)
        self.after_attention, self.after_mlp = hook_of(attention), hook_of(mlp)
        self.dim: int = attention.head_dim
        self.options = step.attention_options[self.index]


class Layer(LayerParts):
    """One decoder layer, run by kernels that can be recorded."""

    def __init__(self, layer: Any, step: ForwardContext) -> None:
        super().__init__(layer, step)
        self.qkv = [self.attention.q_proj, self.attention.k_proj, self.attention.v_proj]
        self.gate_up = [self.mlp.gate_proj, self.mlp.up_proj]

    def __call__(self, stream: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """The residual stream [T, hidden] after this layer, of the one before it; cos and sin [T, head_dim].

        All are contiguous, and none is changed. Only our kernels compute, so that the layer can be recorded:
        torch makes nothing but views.
        """
        step, (first, second) = self.step, self.norms
        step.residual = stream
        normed = self.fast_norms[0](stream, self._biases(first, stream))
        self.after_first_norm(first, (stream,), normed)
        q, k, v = (by_head(y, self.dim) for y in fused_outputs(self.qkv, normed))
        for x, norm in ((q, self.head_norms[0]), (k, self.head_norms[1])):
            rotate_(x, cos, sin, norm)
        attended = step.attention(self.index, q, k, v, self.options)
        added = self.attention.o_proj(attended.flatten(1))
        self.after_attention(self.attention, None, added)

        stream, normed = self.fast_norms[1].of_sum(stream, added, self._biases(second, stream))
        step.residual = stream
        self.after_second_norm(second, (stream,), normed)
        gate, up = fused_outputs(self.gate_up, normed)
        added = self.mlp.down_proj(silu_times(gate, up))
        self.after_mlp(self.mlp, None, added)
        return add_(added, stream)

    def _biases(self, norm: Any, stream: torch.Tensor) -> Biases | None:
        columns = [slice(0, stream.shape[1])]
        return biases_of(self.step.affine, [site_of(norm)], columns, len(stream))


class Decoder:
    """All layers of a model; `forward` replaces each layer's own."""

    def __init__(self, layers: list[Any], step: ForwardContext, max_context: int) -> None:
        self.layers = [Layer(layer, step) for layer in layers]
        self.recorded_steps = RecordedSteps(self.layers, step, max_context)
        self.ran_all_layers = False  # in this step, at the call of layer 0

    def forward(
        self,
        index: int,
        hidden_states: torch.Tensor,
        *_args: Any,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        **_kwargs: Any,
    ) -> torch.Tensor:
        """Layer `index`'s output [1, T, hidden], as its class returns it."""
        stream = hidden_states[0]
        cos, sin = (part[0].contiguous() for part in position_embeddings)
        if index == 0:
            result = self.recorded_steps.run(stream, cos, sin)
            self.ran_all_layers = result is not None
            if result is not None:
                return result[None]
        elif self.ran_all_layers:
            return hidden_states
        return self.layers[index](stream, cos, sin)[None]


def by_head(x: torch.Tensor, dim: int) -> torch.Tensor:
    """[T, heads * dim] as [T, heads, dim], over the same memory; T may be 0."""
    return x.view(x.shape[0], x.shape[1] // dim, dim)


def fused_outputs(members: list[LinearSite], x: torch.Tensor) -> list[torch.Tensor]:
    """The outputs [T, out] of linears that see the same x [T, in]: columns of one tensor where possible."""
    fused = members[0].fused
    assert fused is not None
    if members[0].step.inputs:  # adapters that change the input, of each linear in another way
        return [member(x) for member in members]
    outputs = fused.outputs(x)
    for member, y in zip(members, outputs, strict=True):
        member.add_adapters(x, y)
    return outputs


def is_llama_like(layer: Any) -> bool:
    """Whether the layer has the modules of a Llama layer, and every linear is packed for our kernels."""
    if not is_built_as_llama(layer):
        return False
    sites = [m for m in layer.modules() if isinstance(m, LinearSite)]
    first_siblings = [layer.self_attn.q_proj, layer.mlp.gate_proj]
    return (
        len(sites) == 7
        and all(site.packed for site in sites)
        and all(isinstance(site.fused, FusedLinears) for site in first_siblings)
    )


def is_built_as_llama(layer: Any) -> bool:
    """Whether the layer has exactly the modules of a Llama layer, and SiLU as its activation."""
    if children_of(layer) != LLAMA_LAYER:
        return False
    if children_of(layer.self_attn) not in (LLAMA_ATTENTION, LLAMA_ATTENTION | set(HEAD_NORMS)):
        return False
    x = torch.linspace(-8, 8, 33)
    return (
        children_of(layer.mlp) == LLAMA_MLP
        and all(hasattr(norm, "variance_epsilon") for norm in norms_of(layer))
        and torch.allclose(layer.mlp.act_fn(x), F.silu(x))
    )


def children_of(module: nn.Module) -> set[str]:
    """The names of a module's children."""
    return {name for name, _ in module.named_children()}


def norms_of(layer: Any) -> Iterator[nn.Module]:
    """The layer's norms, those of heads included."""
    yield from (module for name, module in layer.named_modules() if name.endswith("norm"))


@torch.inference_mode()
def install_cpu_layers(model: Any, step: ForwardContext) -> Decoder | None:
    """Replace the forward of each layer of `model`, if all are Llama-like and the hidden states stay the
    same.

    None if not. Writes to the first pages, and leaves them zeroed.
    """
    layers = [layer for _, layer in decoder_layers(model, model.config.num_hidden_layers)]
    if not layers or not all(map(is_llama_like, layers)) or not supports_pages(step.pages.keys[0]):
        return None
    with without_rounding():
        return swap_forward_if_equal(
            model,
            layers,
            lambda: Decoder(layers, step, model.config.max_position_embeddings),
            lambda: _states(model, step),
        )


def _states(model: Any, step: ForwardContext) -> torch.Tensor:
    """Hidden states [1, PROBE_TOKENS, hidden] of the probe, as a prompt in the first block."""
    step.begin_prompt(PROBE_TOKENS)
    states = probe_states(model)
    for pages in (*step.pages.keys, *step.pages.values):
        pages[0].zero_()
    return states
