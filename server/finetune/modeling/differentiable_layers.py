"""Llama-like decoder layers for training: fused operations between the linears, forward and backward.

As in serving (engine/cpu/decoder_layers.py), layers that are built like Llama's are replaced if the whole
model gives equal states with them; every other model keeps its own classes. In those a norm is six operators
forward and a dozen backward, each a pass over memory.

The last layer computes queries and the MLP only for the `selected` tokens, whose logits are needed; of all
others it needs keys and values only.
"""

from typing import Any

import torch

from server.engine.cpu.decoder_layers import LayerParts, by_head, is_built_as_llama
from server.engine.cpu.verified_swap import PROBE_TOKENS, probe_states, swap_forward_if_equal
from server.engine.model.module_hooks import decoder_layers
from server.finetune.modeling.attention import TrainingStep
from server.finetune.modeling.autograd_functions import gated, norm, norm_of_sum, rotated
from server.kernels.cpu.llama_ops import RmsNorm
from server.kernels.cpu.openmp import AVAILABLE


class TrainingLayer(LayerParts):
    """One decoder layer. It calls the linears and hooks of the module that it replaces."""

    step: TrainingStep

    def __call__(
        self, stream: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, selected: torch.Tensor | None
    ) -> torch.Tensor:
        """The layer's output for stream [T, hidden]: [T, hidden], or [n, hidden] of the n `selected` tokens.

        cos and sin are [T, head_dim].
        """
        step, attention, (first, second) = self.step, self.attention, self.norms
        step.residual = stream
        normed = norm(stream, self.fast_norms[0])
        self.after_first_norm(first, (stream,), normed)
        k = self._rotated(attention.k_proj(normed), cos, sin, self.head_norms[1])
        v = by_head(attention.v_proj(normed), self.dim)
        if selected is not None:
            stream, normed, cos, sin = (x.index_select(0, selected) for x in (stream, normed, cos, sin))
        q = self._rotated(attention.q_proj(normed), cos, sin, self.head_norms[0])
        seen = step.attend(self.index, q, k, v, self.options, selected=selected is not None)
        added = attention.o_proj(seen.flatten(1))
        step.residual = stream
        self.after_attention(attention, None, added)

        stream, normed = norm_of_sum(stream, added, self.fast_norms[1])
        step.residual = stream
        self.after_second_norm(second, (stream,), normed)
        added = self.mlp.down_proj(gated(self.mlp.gate_proj(normed), self.mlp.up_proj(normed)))
        self.after_mlp(self.mlp, None, added)
        result: torch.Tensor = stream + added
        return result

    def _rotated(
        self, y: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, head_norm: RmsNorm | None
    ) -> torch.Tensor:
        """[T, heads, head_dim] of y [T, heads * head_dim]: normed if heads have a norm, and rotated."""
        heads = by_head(y, self.dim)
        if head_norm is not None:
            heads = norm(heads.flatten(0, 1), head_norm).view(heads.shape)
        return rotated(heads, cos, sin)


class TrainingDecoder:
    """All layers of a model; `forward` replaces each layer's own."""

    selected: torch.Tensor | None = None  # int64 [n]: the tokens that the last layer computes

    def __init__(self, layers: list[Any], step: TrainingStep) -> None:
        self.layers = [TrainingLayer(layer, step) for layer in layers]

    def forward(
        self,
        index: int,
        hidden_states: torch.Tensor,
        *_args: Any,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        **_kwargs: Any,
    ) -> torch.Tensor:
        """The output of one layer for hidden_states [1, T, hidden], in the same shape."""
        cos, sin = (part[0].contiguous() for part in position_embeddings)
        selected = self.selected if index == len(self.layers) - 1 else None
        stream: torch.Tensor = self.layers[index](hidden_states[0].contiguous(), cos, sin, selected)
        return stream[None]


@torch.no_grad()
def install_training_layers(model: Any, step: TrainingStep) -> TrainingDecoder | None:
    """Replace the forward of all layers, if all are Llama-like and the model's states stay equal."""
    layers: list[Any] = [layer for _, layer in decoder_layers(model, model.config.num_hidden_layers)]
    plain = all(p.device.type == "cpu" and p.dtype == torch.float32 for p in model.parameters())
    if not AVAILABLE or not plain or not layers or not all(map(is_built_as_llama, layers)):
        return None
    return swap_forward_if_equal(
        model, layers, lambda: TrainingDecoder(layers, step), lambda: _states(model, step)
    )


def _states(model: Any, step: TrainingStep) -> torch.Tensor:
    step.lengths = [PROBE_TOKENS]
    return probe_states(model)
