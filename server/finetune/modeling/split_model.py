"""A causal LM split in two: the decoder, from tokens to hidden states, and the head, from states to logits.

Between them training selects the tokens that have a target, and computes their logits a chunk at a time.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from server.engine.model.module_hooks import decoder_layers
from server.engine.model.output_head import OutputHead
from server.finetune.modeling.differentiable_layers import TrainingDecoder


class SplitCausalLM(OutputHead):
    """`recompute`: recompute each layer in backward instead of keeping its activations."""

    recompute = False

    def __init__(self, model: Any, layers: TrainingDecoder | None = None) -> None:
        """`layers`: the training layers of `model`, if they are installed."""
        super().__init__(model)
        self.layers = layers
        for _, layer in decoder_layers(model, model.config.num_hidden_layers):
            layer.forward = partial(self._layer, layer.forward)

    def hidden(
        self, ids: torch.Tensor, positions: torch.Tensor, selected: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The last hidden states of T packed tokens: [T, hidden], or [n, hidden] of the `selected` ones."""
        if self.layers:
            self.layers.selected = selected
        output = self.decoder(input_ids=ids[None], position_ids=positions[None], use_cache=False)
        self.precomputed.kind = type(output)
        states: torch.Tensor = output.last_hidden_state[0]
        return states if self.layers or selected is None else states[selected]

    def _layer(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if not self.recompute or not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
