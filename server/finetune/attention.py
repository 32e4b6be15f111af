"""Attention of a batch in training: each sequence sees itself alone, by the kernel that serves prefill."""

from collections.abc import Sequence
from typing import Any

import torch

from server.adapters.methods.base import Start
from server.engine.attention import Step
from server.kernels.attention import Scores, prefill_attention

Layers = list[tuple[torch.Tensor, torch.Tensor]]  # of each layer K and V [kv_heads, n, head_dim]


class TrainingStep(Step):
    """The batch under way: sequences of these lengths, one behind the other, all under slot 1."""

    def __init__(self) -> None:
        super().__init__()
        self.lengths: list[int] = []  # type: ignore[assignment]  # of sequences, where serving has rows' own
        self.start: Layers = []  # K and V of virtual tokens before each sequence; empty: none
        self.seen: Layers | None = None  # where K and V of the batch are kept, if anybody asks

    def begin_with(self, start: Start | None) -> None:
        """Put these K and V before each sequence from now on."""
        if start is None:
            self.start = []
            return
        keys, values = start.keys.transpose(1, 2).unbind(), start.values.transpose(1, 2).unbind()
        self.start = list(zip(keys, values, strict=True))


def attend_within(
    module: Any,
    query: torch.Tensor,  # [1, heads, T, head_dim]
    key: torch.Tensor,  # [1, kv_heads, T, head_dim]
    value: torch.Tensor,
    _mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """What transformers calls for each layer: [1, T, heads, head_dim]."""
    step: TrainingStep = module.polypeft_step
    if step.seen is not None:
        step.seen.append((key[0], value[0]))
    scores = Scores(
        query.shape[-1] ** -0.5 if scaling is None else scaling, sliding_window or 0, softcap or 0.0
    )
    before = step.start[module.layer_idx] if step.start else None
    # split, not sliced: the gradients come back as one concatenation
    parts = zip(
        torch.split(query[0].transpose(0, 1), step.lengths),
        torch.split(key[0], step.lengths, 1),
        torch.split(value[0], step.lengths, 1),
        strict=True,
    )
    out = [prefill_attention(q, _behind(before, 0, k), _behind(before, 1, v), scores) for q, k, v in parts]
    return torch.cat(out)[None], None


def _behind(before: Sequence[torch.Tensor] | None, which: int, own: torch.Tensor) -> torch.Tensor:
    return own if before is None else torch.cat([before[which], own], 1)
