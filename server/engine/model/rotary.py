"""Rotary scaling chosen for each row, where transformers chooses it for the whole batch.

Two kinds of scaling depend on the largest position computed together, so that one row would change another
row's keys:

longrope (Phi-3): two sets of frequencies, one for rows of up to `original_max_position_embeddings` tokens,
one for longer ones. Here each token gets the set of its own row, by the row's length in this step. When a row
grows past that length, the scheduler recomputes its keys with the other set, as transformers' own generation
does; keys of the two sets share no prefix.

dynamic: frequencies that change with each token past the length the model was trained with. All keys of a row
would change with every token, so the context ends at that length.
"""

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from server.engine.model.forward_context import ForwardContext


def longest_context(model: Any, wanted: int = 0) -> int:
    """Tokens of the longest row the model can serve; at most `wanted`, if that is not 0."""
    of_config: int = model.config.max_position_embeddings
    dynamic = [
        module.original_max_seq_len for module, kinds in _rotaries(model) if "dynamic" in kinds.values()
    ]
    longest: int = min(of_config, wanted or of_config, *dynamic)
    return longest


def scale_by_row(model: nn.Module, step: ForwardContext) -> tuple[int, ...]:
    """Replace the forward of every longrope embedding of `model` by one that reads `step.row_lengths`.

    Returns, sorted, the row lengths past which a row has other frequencies.
    """
    switches: set[int] = set()
    for module, kinds in _rotaries(model):
        scaled = [layer_type for layer_type, kind in kinds.items() if kind == "longrope"]
        if ropes := {layer_type: LongRope.of(module, layer_type) for layer_type in scaled}:
            switches.update(rope.switch for rope in ropes.values())
            module.forward = partial(
                _rotate_by_row, module, inspect.unwrap(type(module).forward), ropes, step
            )
    return tuple(sorted(switches))


def _rotaries(model: nn.Module) -> Iterator[tuple[Any, dict[str | None, str]]]:
    """Rotary embeddings, each with its kind of scaling by layer type; None where a model has one type."""
    for module in model.modules():
        kinds: Any = getattr(module, "rope_type", None)
        if isinstance(kinds, str):
            yield module, {None: kinds}
        elif isinstance(kinds, dict):
            yield module, kinds


@dataclass(frozen=True)
class LongRope:
    """Both sets of frequencies [rotated / 2] of a rotary embedding."""

    buffer: str  # the module's attribute that holds the set in use
    short: torch.Tensor
    long: torch.Tensor
    switch: int  # tokens of the longest row that uses `short`

    @classmethod
    def of(cls, module: Any, layer_type: str | None) -> "LongRope":
        """`layer_type`: which layers use these frequencies, where a model has several types."""
        prefix = f"{layer_type}_" if layer_type else ""
        parameters = module.config.rope_parameters
        of_type = parameters[layer_type] if layer_type else parameters
        switch = of_type["original_max_position_embeddings"]
        buffer = f"{prefix}inv_freq"
        device = getattr(module, buffer).device
        named = {"layer_type": layer_type} if layer_type else {}
        # for a row of one token more than the switch, transformers returns the long set
        long, _ = ROPE_INIT_FUNCTIONS["longrope"](module.config, device, seq_len=switch + 1, **named)
        short = getattr(module, f"{prefix}original_inv_freq")
        return cls(buffer, short.to(device), long.to(device), int(switch))


def _rotate_by_row(
    module: nn.Module,
    forward: Callable[..., tuple[torch.Tensor, torch.Tensor]],
    ropes: dict[str | None, LongRope],
    step: ForwardContext,
    x: torch.Tensor,
    position_ids: torch.Tensor,  # [1, T]
    layer_type: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin, both [1, T, rotated], each token's by the length of its own row."""
    named = {"layer_type": layer_type} if layer_type else {}
    rope = ropes.get(layer_type)
    if rope is None:
        return forward(module, x, position_ids, **named)
    both = []
    for frequencies in (rope.long, rope.short):
        setattr(module, rope.buffer, frequencies)
        both.append(forward(module, x, position_ids, **named))
    lengths = position_ids + 1 if step.row_lengths is None else step.row_lengths[None]
    long = (lengths > rope.switch)[..., None]
    (long_cos, long_sin), (short_cos, short_sin) = both
    return torch.where(long, long_cos, short_cos), torch.where(long, long_sin, short_sin)
