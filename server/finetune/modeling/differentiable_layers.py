"""Llama-like decoder layers as training runs them: what stands between the linears is one pass each way.

As serving does (engine/layers.py): a layer that is built as Llama's is runs here, once a prompt has come out
of the whole model as it does by its classes; every other model stays with them. By the classes a norm is six
operators forward and a dozen backward, each a pass over memory.

The last layer goes on with `places` alone, the tokens whose logits are wanted: all the others are needed for
no more than their keys and values there.
"""

from typing import Any

import torch

from server.engine.cpu.decoder_layers import LayerParts, by_head, is_built_as_llama
from server.engine.cpu.verified_swap import PROBE, probe, swap_forward_if_equal
from server.engine.model.module_hooks import decoder_layers
from server.finetune.modeling.attention import TrainingStep
from server.finetune.modeling.autograd_functions import gated, norm, norm_of_sum, rotated
from server.kernels.cpu.llama_ops import RmsNorm
from server.kernels.cpu.openmp import AVAILABLE


class TrainingLayer(LayerParts):
    """One decoder layer; its linears and hooks are those of the class."""

    step: TrainingStep

    def __call__(
        self, stream: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, places: torch.Tensor | None
    ) -> torch.Tensor:
        """stream [T, hidden] after this layer, of all tokens or of `places`; cos and sin [T, head_dim]."""
        step, attention, (first, second) = self.step, self.attention, self.norms
        step.residual = stream
        normed = norm(stream, self.fast_norms[0])
        first.polypeft_after(first, (stream,), normed)
        k = self._turned(attention.k_proj(normed), cos, sin, self.head_norms[1])
        v = by_head(attention.v_proj(normed), self.dim)
        if places is not None:
            stream, normed, cos, sin = (x.index_select(0, places) for x in (stream, normed, cos, sin))
        q = self._turned(attention.q_proj(normed), cos, sin, self.head_norms[0])
        seen = step.attend(self.index, q, k, v, self.scores, kept=places is not None)
        added = attention.o_proj(seen.flatten(1))
        step.residual = stream
        attention.polypeft_after(attention, None, added)

        stream, normed = norm_of_sum(stream, added, self.fast_norms[1])
        step.residual = stream
        second.polypeft_after(second, (stream,), normed)
        added = self.mlp.down_proj(gated(self.mlp.gate_proj(normed), self.mlp.up_proj(normed)))
        self.mlp.polypeft_after(self.mlp, None, added)
        result: torch.Tensor = stream + added
        return result

    def _turned(
        self, y: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, of_heads: RmsNorm | None
    ) -> torch.Tensor:
        """[T, heads, head_dim] of y [T, heads * head_dim]."""
        heads = by_head(y, self.dim)
        if of_heads is not None:
            heads = norm(heads.flatten(0, 1), of_heads).view(heads.shape)
        return rotated(heads, cos, sin)


class TrainingDecoder:
    """All layers of a model; `forward` stands in the place of each one's own."""

    places: torch.Tensor | None = None  # int64: what the last layer goes on with

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
        """[1, T, hidden], as the class gives it."""
        cos, sin = (part[0].contiguous() for part in position_embeddings)
        places = self.places if index == len(self.layers) - 1 else None
        stream: torch.Tensor = self.layers[index](hidden_states[0].contiguous(), cos, sin, places)
        return stream[None]


@torch.no_grad()
def install_training_layers(model: Any, step: TrainingStep) -> TrainingDecoder | None:
    """Give each layer of `model` the forward above, if all can have it and the states stay the same."""
    layers: list[Any] = [layer for _, layer in decoder_layers(model, model.config.num_hidden_layers)]
    plain = all(p.device.type == "cpu" and p.dtype == torch.float32 for p in model.parameters())
    if not AVAILABLE or not plain or not layers or not all(map(is_built_as_llama, layers)):
        return None
    return swap_forward_if_equal(
        model, layers, lambda: TrainingDecoder(layers, step), lambda: _states(model, step)
    )


def _states(model: Any, step: TrainingStep) -> torch.Tensor:
    step.lengths = [PROBE]
    return probe(model)
