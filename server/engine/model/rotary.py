"""Rotary scaling that transformers decides for a whole batch, decided for each row.

Two kinds look at the largest position of all that is computed together, so that one row would turn another's
keys:

longrope (Phi-3): two sets of frequencies, one for rows of up to `original_max_position_embeddings` tokens,
one for longer ones. Here each token gets the set of its own row, by the row's length in this step. A row that
grows past that length has keys of the other set: the scheduler computes them anew, as transformers' own
generation does, and keys of the two sets share no prefix.

dynamic: frequencies that change with each token past the length the model was trained with. All of a row's
keys would change with every token, so the context ends there.
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
    """Tokens of the longest row; `wanted`: 0, or at most so many."""
    own: int = model.config.max_position_embeddings
    dynamic = [
        module.original_max_seq_len for module, kinds in _rotaries(model) if "dynamic" in kinds.values()
    ]
    longest: int = min(own, wanted or own, *dynamic)
    return longest


def scale_by_row(model: nn.Module, step: ForwardContext) -> tuple[int, ...]:
    """Let every rotary embedding of `model` choose its frequencies by `step.row_lengths`.

    Gives the lengths past which a row has other ones.
    """
    switches: set[int] = set()
    for module, kinds in _rotaries(model):
        long = [layers for layers, kind in kinds.items() if kind == "longrope"]
        if own := {layers: LongRope.of(module, layers) for layers in long}:
            switches.update(rope.switch for rope in own.values())
            module.forward = partial(_turn, module, inspect.unwrap(type(module).forward), own, step)
    return tuple(sorted(switches))


def _rotaries(model: nn.Module) -> Iterator[tuple[Any, dict[str | None, str]]]:
    """Rotary embeddings, and their kind by type of layer; None where a model has one type."""
    for module in model.modules():
        kinds: Any = getattr(module, "rope_type", None)
        if isinstance(kinds, str):
            yield module, {None: kinds}
        elif isinstance(kinds, dict):
            yield module, kinds


@dataclass(frozen=True)
class LongRope:
    """Both sets of frequencies of a rotary embedding, and the longest row that has the first."""

    buffer: str  # the module's name for those in force
    short: torch.Tensor
    long: torch.Tensor
    switch: int

    @classmethod
    def of(cls, module: Any, layers: str | None) -> "LongRope":
        """`layers`: the type of layers that have these, where a model has several."""
        prefix = f"{layers}_" if layers else ""
        parameters = module.config.rope_parameters
        switch = (parameters[layers] if layers else parameters)["original_max_position_embeddings"]
        buffer = f"{prefix}inv_freq"
        device = getattr(module, buffer).device
        # asked for one token more than the switch, it gives the long ones
        named = {"layer_type": layers} if layers else {}
        long, _ = ROPE_INIT_FUNCTIONS["longrope"](module.config, device, seq_len=switch + 1, **named)
        short = getattr(module, f"{prefix}original_inv_freq")
        return cls(buffer, short.to(device), long.to(device), int(switch))


def _turn(
    module: nn.Module,
    forward: Callable[..., tuple[torch.Tensor, torch.Tensor]],
    ropes: dict[str | None, LongRope],
    step: ForwardContext,
    x: torch.Tensor,
    position_ids: torch.Tensor,  # [1, T]
    layer_type: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin, both [1, T, rotated], of each token by its own row."""
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
