"""A causal LM in two halves: from tokens to hidden states, and from any of those to logits.

Between them training picks the tokens that have a target, and takes their logits a few at a time.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from server.engine.model.module_hooks import decoder_layers
from server.finetune.modeling.differentiable_layers import TrainingDecoder


class SplitCausalLM:
    """`recompute`: backward computes each layer once more instead of keeping all that was in it."""

    recompute = False

    def __init__(self, model: Any, layers: TrainingDecoder | None = None) -> None:
        """`layers`: those of `model`, where kernels of ours run them."""
        self.model = model
        self.name: str = model.base_model_prefix
        self.decoder: nn.Module = getattr(model, self.name)
        self.layers = layers
        self.given = Given()
        for _, layer in decoder_layers(model, model.config.num_hidden_layers):
            layer.forward = partial(self._layer, layer.forward)

    def hidden(
        self, ids: torch.Tensor, positions: torch.Tensor, places: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The last hidden states of packed tokens: [T, hidden], or [n, hidden] of those at `places`."""
        if self.layers:
            self.layers.places = places
        output = self.decoder(input_ids=ids[None], position_ids=positions[None], use_cache=False)
        self.given.kind = type(output)
        states: torch.Tensor = output.last_hidden_state[0]
        return states if self.layers or places is None else states[places]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[rows, hidden] -> [rows, vocabulary], as the model's own class has it, with caps and scales."""
        self.given.hidden = hidden[None]
        setattr(self.model, self.name, self.given)
        try:
            logits: torch.Tensor = self.model(use_cache=False).logits[0]
        finally:
            setattr(self.model, self.name, self.decoder)
            self.given.hidden = None
        return logits

    def _layer(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if not self.recompute or not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)


class Given(nn.Module):
    """In the decoder's place: hidden states that are there already."""

    hidden: torch.Tensor | None = None
    kind: Any = None  # the class of the decoder's own output

    def forward(self, *_args: Any, **_kwargs: Any) -> Any:
        return self.kind(last_hidden_state=self.hidden)
