"""The output head of a causal LM alone: logits of hidden states that its decoder has computed before."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


class OutputHead:
    """Runs the model's own class with the decoder replaced, so that its caps and scales apply."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._name: str = model.base_model_prefix
        self.decoder: nn.Module = getattr(model, self._name)
        self.precomputed = PrecomputedStates()

    @contextmanager
    def capture(self) -> Iterator[list[torch.Tensor]]:
        """Inside, each run of the decoder appends its last hidden states [1, T, hidden] to the list."""
        found: list[torch.Tensor] = []

        def keep(_module: nn.Module, _args: Any, output: Any) -> None:
            self.precomputed.kind = type(output)
            found.append(output.last_hidden_state)

        handle = self.decoder.register_forward_hook(keep)
        try:
            yield found
        finally:
            handle.remove()

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits [n, vocabulary] of hidden [n, hidden]."""
        self.precomputed.hidden = hidden[None]
        setattr(self._model, self._name, self.precomputed)
        try:
            logits: torch.Tensor = self._model(use_cache=False).logits[0]
        finally:
            setattr(self._model, self._name, self.decoder)
            self.precomputed.hidden = None
        return logits


class PrecomputedStates(nn.Module):
    """Takes the decoder's place while logits are computed, and returns the given hidden states."""

    hidden: torch.Tensor | None = None
    kind: Any = None  # the class of the decoder's output

    def forward(self, *_args: Any, **_kwargs: Any) -> Any:
        return self.kind(last_hidden_state=self.hidden)
