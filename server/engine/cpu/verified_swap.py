"""Replace the forward of a model's layers, if the hidden states of a probe prompt stay the same."""

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol, TypeVar

import torch

from server.engine.model.rotary import longest_context
from server.kernels.cpu.openmp import ShapeError

log = logging.getLogger(__name__)

PROBE_TOKENS = 9  # of the prompt that runs both ways
TOLERANCE = 1e-4  # largest difference of a state, over the largest state


class Runner(Protocol):
    """Runs the layers of a model."""

    @property
    def forward(self) -> Callable[..., torch.Tensor]:
        """`forward(i, ...)` replaces the forward of layer i."""


R = TypeVar("R", bound=Runner)


def swap_forward_if_equal(
    model: Any,
    layers: Sequence[Any],
    make: Callable[[], R],
    states: Callable[[], torch.Tensor],
) -> R | None:
    """Let the runner from `make` run the layers, if `states()`, the hidden states of the probe, stay the
    same.

    Returns the runner; else None, with the layers as they were. The classes run before `make` is called.
    """
    expected = states()
    runner = make()
    for i, layer in enumerate(layers):
        layer.forward = partial(runner.forward, i)
    try:
        error = float((states() - expected).abs().max() / expected.abs().max())
    except ShapeError:  # its heads are rotated in part, or unlike a Llama's
        error = float("inf")
    if error <= TOLERANCE:  # not if it is NaN
        return runner
    log.warning("%s runs by its class: by our kernels it is %.1e off", type(model).__name__, error)
    for layer in layers:
        del layer.forward
    return None


def probe_states(model: Any) -> torch.Tensor:
    """Last hidden states [1, PROBE_TOKENS, hidden] of a prompt with positions at both ends of the context.

    The forward context must be set for a prompt of PROBE_TOKENS tokens.
    """
    ids = torch.arange(1, PROBE_TOKENS + 1) % model.config.vocab_size
    context = longest_context(model)
    first = -(-PROBE_TOKENS // 2)
    positions = torch.cat([torch.arange(first), torch.arange(context - PROBE_TOKENS + first, context)])
    decoder = getattr(model, model.base_model_prefix)
    output = decoder(input_ids=ids[None], position_ids=positions[None], use_cache=False)
    states: torch.Tensor = output.last_hidden_state
    return states
