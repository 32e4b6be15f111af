"""Llama-like decoder layers as training runs them: what stands between the linears is one pass each way.

As serving does (engine/layers.py): a layer that is built as Llama's is runs here, once a prompt has come out
of the whole model as it does by its classes; every other model stays with them. By the classes a norm is six
operators forward and a dozen backward, each a pass over memory.

The last layer goes on with `places` alone, the tokens whose logits are wanted: all the others are needed for
no more than their keys and values there.
"""

import logging
from functools import partial
from typing import Any

import torch

from server.engine.layers import PROBE, TOLERANCE, by_head, is_built_as_llama
from server.engine.sublayers import decoder_layers
from server.finetune.attention import TrainingStep
from server.kernels.elementwise import RmsNorm, rotate_, silu_times
from server.kernels.gradients import norm_gradient, silu_times_gradients
from server.kernels.openmp import AVAILABLE

log = logging.getLogger(__name__)


class TrainedLayer:
    """One decoder layer; its linears and hooks are those of the class."""

    def __init__(self, layer: Any, step: TrainingStep) -> None:
        attention = layer.self_attn
        self.step = step
        self.index: int = attention.layer_idx
        self.attention, self.mlp = attention, layer.mlp
        self.norms = (layer.input_layernorm, layer.post_attention_layernorm)
        self.kernels = [RmsNorm(norm.weight, norm.variance_epsilon) for norm in self.norms]
        self.head_norms = [
            RmsNorm(norm.weight, norm.variance_epsilon) if norm is not None else None
            for norm in (getattr(attention, name, None) for name in ("q_norm", "k_norm"))
        ]
        self.dim: int = attention.head_dim
        self.scores = step.heard[self.index]

    def __call__(
        self, stream: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, places: torch.Tensor | None
    ) -> torch.Tensor:
        """stream [T, hidden] after this layer, of all tokens or of `places`; cos and sin [T, head_dim]."""
        step, attention, (first, second) = self.step, self.attention, self.norms
        step.residual = stream
        normed = _Norm.run(stream, self.kernels[0])
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

        stream, normed = _NormOfSum.run(stream, added, self.kernels[1])
        step.residual = stream
        second.polypeft_after(second, (stream,), normed)
        added = self.mlp.down_proj(_SiluTimes.run(self.mlp.gate_proj(normed), self.mlp.up_proj(normed)))
        self.mlp.polypeft_after(self.mlp, None, added)
        result: torch.Tensor = stream + added
        return result

    def _turned(
        self, y: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, norm: RmsNorm | None
    ) -> torch.Tensor:
        """[T, heads, head_dim] of y [T, heads * head_dim]."""
        if norm is not None:
            y = _Norm.run(y.view(-1, self.dim), norm).view(y.shape)
        return _Turned.run(by_head(y, self.dim), cos, sin)


class TrainedDecoder:
    """All layers of a model; `forward` stands in the place of each one's own."""

    places: torch.Tensor | None = None  # int64: what the last layer goes on with

    def __init__(self, layers: list[Any], step: TrainingStep) -> None:
        self.layers = [TrainedLayer(layer, step) for layer in layers]

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
def run_by_kernels(model: Any, step: TrainingStep) -> TrainedDecoder | None:
    """Give each layer of `model` the forward above, if all can have it and the states stay the same."""
    layers: list[Any] = [layer for _, layer in decoder_layers(model, model.config.num_hidden_layers)]
    plain = all(p.device.type == "cpu" and p.dtype == torch.float32 for p in model.parameters())
    if not AVAILABLE or not plain or not layers or not all(map(is_built_as_llama, layers)):
        return None
    expected = _states(model, step)
    decoder = TrainedDecoder(layers, step)
    for i, layer in enumerate(layers):
        layer.forward = partial(decoder.forward, i)
    error = float((_states(model, step) - expected).abs().max() / expected.abs().max())
    if error <= TOLERANCE:
        return decoder
    log.warning("%s trains by its class: by our kernels it is %.1e off", type(model).__name__, error)
    for layer in layers:
        del layer.forward
    return None


def _states(model: Any, step: TrainingStep) -> torch.Tensor:
    ids = torch.arange(1, PROBE + 1) % model.config.vocab_size
    step.lengths = [PROBE]
    decoder = getattr(model, model.base_model_prefix)
    output = decoder(input_ids=ids[None], position_ids=torch.arange(PROBE)[None], use_cache=False)
    states: torch.Tensor = output.last_hidden_state
    return states


class _Norm(torch.autograd.Function):
    """x [T, n], contiguous -> its norm."""

    @classmethod
    def run(cls, x: torch.Tensor, norm: RmsNorm) -> torch.Tensor:
        apply: Any = cls.apply  # torch has no types for it
        y: torch.Tensor = apply(x, norm)
        return y

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, norm: RmsNorm) -> torch.Tensor:
        ctx.save_for_backward(x)
        ctx.norm = norm
        return norm(x)

    @staticmethod
    def backward(ctx: Any, upon: torch.Tensor) -> tuple[torch.Tensor, None]:
        (x,) = ctx.saved_tensors
        return norm_gradient(ctx.norm, x, upon.contiguous()), None


class _NormOfSum(torch.autograd.Function):
    """(x + added, the norm of that), all [T, n] and contiguous."""

    @classmethod
    def run(cls, x: torch.Tensor, added: torch.Tensor, norm: RmsNorm) -> tuple[torch.Tensor, torch.Tensor]:
        apply: Any = cls.apply
        total, y = apply(x, added, norm)
        return total, y

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, added: torch.Tensor, norm: RmsNorm
    ) -> tuple[torch.Tensor, torch.Tensor]:
        total, y = norm.of_sum(x, added)
        ctx.save_for_backward(total)
        ctx.norm = norm
        return total, y

    @staticmethod
    def backward(
        ctx: Any, upon_total: torch.Tensor, upon: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, None]:
        (total,) = ctx.saved_tensors
        found = norm_gradient(ctx.norm, total, upon.contiguous(), upon_total.contiguous())
        return found, found, None


class _Turned(torch.autograd.Function):
    """x [T, heads, head_dim] under the rotary embedding."""

    @classmethod
    def run(cls, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        apply: Any = cls.apply
        y: torch.Tensor = apply(x, cos, sin)
        return y

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, upon: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turn(upon, cos, -sin), None, None


def _turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    y = x.clone(memory_format=torch.contiguous_format)
    rotate_(y, cos, sin)
    return y


class _SiluTimes(torch.autograd.Function):
    """silu(gate) * up, [T, n] and contiguous."""

    @classmethod
    def run(cls, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        apply: Any = cls.apply
        y: torch.Tensor = apply(gate, up)
        return y

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        return silu_times(gate, up)

    @staticmethod
    def backward(ctx: Any, upon: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        gate, up = ctx.saved_tensors
        return silu_times_gradients(gate, up, upon.contiguous())
