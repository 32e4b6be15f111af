"""Llama-like decoder layers, step by step in kernels of ours: the same sites, the same sums, fewer calls.

transformers' own classes say what a model computes. A layer that is built as Llama's is (told by its modules)
is run here instead, once a prompt has come out of the whole model as it does by its classes: a model that
scales, caps or orders things in its own way stays with them. At 16 rows half of a step's time was between
the linears.

    r = x;  n = norm(r);  q, k, v = W n;  h = W attention(rotate(q), rotate(k), v)
    r = r + h;  n = norm(r);  x = r + W (silu(W n) * W n)

Steps of few tokens are one launch from the first layer to the last (recorded_steps.py).
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from server.engine.cpu.recorded_steps import RecordedSteps
from server.engine.cpu.verified_swap import PROBE, probe, swap_forward_if_equal
from server.engine.model.forward_context import ForwardContext, PrefillChunk, places_of
from server.engine.model.linear_sites import FusedLinears, LinearSite, biases_of
from server.engine.model.module_hooks import decoder_layers
from server.kernels.cpu.decode_attention import takes
from server.kernels.cpu.fused_bias import Biases
from server.kernels.cpu.int8.linear import without_rounding
from server.kernels.cpu.llama_ops import RmsNorm, add_, rotate_, silu_times
from server.kernels.cpu.paged_attention import BLOCK

LAYER = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
ATTENTION, HEAD_NORMS = {"q_proj", "k_proj", "v_proj", "o_proj"}, {"q_norm", "k_norm"}
MLP = {"gate_proj", "up_proj", "down_proj", "act_fn"}


class LayerParts:
    """What a Llama-like layer is made of, which its class has run before."""

    def __init__(self, layer: Any, step: ForwardContext) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.step = step
        self.index: int = attention.layer_idx
        self.attention, self.mlp = attention, mlp
        self.norms = (layer.input_layernorm, layer.post_attention_layernorm)
        self.fast_norms = [RmsNorm(norm.weight, norm.variance_epsilon) for norm in self.norms]
        self.head_norms = [
            RmsNorm(norm.weight, norm.variance_epsilon) if norm is not None else None
            for norm in (getattr(attention, name, None) for name in ("q_norm", "k_norm"))
        ]
        self.dim: int = attention.head_dim
        self.scores = step.heard[self.index]


class Layer(LayerParts):
    """One decoder layer."""

    def __init__(self, layer: Any, step: ForwardContext) -> None:
        super().__init__(layer, step)
        self.qkv = [self.attention.q_proj, self.attention.k_proj, self.attention.v_proj]
        self.gate_up = [self.mlp.gate_proj, self.mlp.up_proj]

    def __call__(self, stream: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """stream [T, hidden] after this layer; cos and sin [T, head_dim]. All contiguous, none changed.

        What is computed here is computed by kernels that can be recorded: torch only makes views.
        """
        step, (first, second) = self.step, self.norms
        step.residual = stream
        normed = self.fast_norms[0](stream, self._biases(first, stream))
        first.polypeft_after(first, (stream,), normed)
        q, k, v = (by_head(y, self.dim) for y in siblings(self.qkv, normed))
        for x, norm in ((q, self.head_norms[0]), (k, self.head_norms[1])):
            rotate_(x, cos, sin, norm)
        seen = step.attention(self.index, q, k, v, self.scores)
        added = self.attention.o_proj(seen.flatten(1))
        self.attention.polypeft_after(self.attention, None, added)

        stream, normed = self.fast_norms[1].of_sum(stream, added, self._biases(second, stream))
        step.residual = stream
        second.polypeft_after(second, (stream,), normed)
        gate, up = siblings(self.gate_up, normed)
        added = self.mlp.down_proj(silu_times(gate, up))
        self.mlp.polypeft_after(self.mlp, None, added)
        return add_(added, stream)

    def _biases(self, norm: Any, stream: torch.Tensor) -> Biases | None:
        columns = [slice(0, stream.shape[1])]
        return biases_of(self.step.affine, [norm.polypeft_site], columns, len(stream))


class Decoder:
    """All layers of a model; `forward` stands in the place of each one's own."""

    def __init__(self, layers: list[Any], step: ForwardContext, max_context: int) -> None:
        self.layers = [Layer(layer, step) for layer in layers]
        self.programs = RecordedSteps(self.layers, step, max_context)
        self.whole = False  # the first layer's call has run them all

    def forward(
        self,
        index: int,
        hidden_states: torch.Tensor,
        *_args: Any,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        **_kwargs: Any,
    ) -> torch.Tensor:
        """[1, T, hidden], as the class gives it."""
        stream = hidden_states[0]
        cos, sin = (part[0].contiguous() for part in position_embeddings)
        if index == 0:
            result = self.programs.run(stream, cos, sin)
            self.whole = result is not None
            if result is not None:
                return result[None]
        elif self.whole:
            return hidden_states
        return self.layers[index](stream, cos, sin)[None]


def by_head(x: torch.Tensor, dim: int) -> torch.Tensor:
    """[T, heads * dim] as [T, heads, dim], over the same memory; T may be 0."""
    return x.view(x.shape[0], x.shape[1] // dim, dim)


def siblings(members: list[LinearSite], x: torch.Tensor) -> list[torch.Tensor]:
    """What linears that see the same x [T, in] give, each [T, out]: columns of one tensor where they can."""
    family = members[0].family
    assert family is not None
    if members[0].step.inputs:  # adapters that change the input, of each in their own way
        return [member(x) for member in members]
    outputs = family.outputs(x)
    for member, y in zip(members, outputs, strict=True):
        member.adapt(x, y)
    return outputs


def is_llama_like(layer: Any) -> bool:
    """Whether it is built as a Llama's layer, and every linear is laid out for our kernels."""
    if not is_built_as_llama(layer):
        return False
    sites = [m for m in layer.modules() if isinstance(m, LinearSite)]
    family = [layer.self_attn.q_proj, layer.mlp.gate_proj]
    return (
        len(sites) == 7
        and all(site.fast for site in sites)
        and all(isinstance(site.family, FusedLinears) for site in family)
    )


def is_built_as_llama(layer: Any) -> bool:
    """Whether it has just the modules of a Llama's layer."""
    if {name for name, _ in layer.named_children()} != LAYER:
        return False
    attention = {name for name, _ in layer.self_attn.named_children()}
    if attention not in (ATTENTION, ATTENTION | HEAD_NORMS):
        return False
    x = torch.linspace(-8, 8, 33)
    return (
        {name for name, _ in layer.mlp.named_children()} == MLP
        and all(hasattr(norm, "variance_epsilon") for norm in norms_of(layer))
        and torch.allclose(layer.mlp.act_fn(x), F.silu(x))
    )


def norms_of(layer: Any) -> Iterator[nn.Module]:
    yield from (module for name, module in layer.named_modules() if name.endswith("norm"))


@torch.inference_mode()
def install_cpu_layers(model: Any, step: ForwardContext) -> Decoder | None:
    """Give each layer of `model` the forward above, if all can have it and the states stay the same.

    None if not. Takes the first pages meanwhile, and leaves them zeroed.
    """
    layers = [layer for _, layer in decoder_layers(model, model.config.num_hidden_layers)]
    if not layers or not all(map(is_llama_like, layers)) or not takes(step.pages.keys[0]):
        return None
    with without_rounding():
        return swap_forward_if_equal(
            model,
            layers,
            lambda: Decoder(layers, step, model.config.max_position_embeddings),
            lambda: _states(model, step),
        )


def _states(model: Any, step: ForwardContext) -> torch.Tensor:
    """Of a prompt in the first block."""
    places = places_of([0], 0, PROBE, torch.device("cpu"))
    step.in_place, step.chunks = 0, [PrefillChunk(0, PROBE, PROBE, torch.tensor([0]), places)]
    assert PROBE <= BLOCK
    states = probe(model)
    for pages in (*step.pages.keys, *step.pages.values):
        pages[0].zero_()
    return states
