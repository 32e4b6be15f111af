"""Attention of a batch in training: each sequence sees itself alone, by the kernel that serves prefill.

Virtual tokens stand before every sequence, and see nothing but each other: what a layer makes of them is the
same for all, and is computed once a batch. Of prefix tuning their K and V are given. Of prompt tuning they
are the first sequence of the batch, whose K and V all others see.
"""

from typing import Any

import torch

from server.adapters.methods.interface import Start
from server.engine.model.attention import read_attention_options
from server.engine.model.forward_context import ForwardContext
from server.kernels.cpu.paged_attention import AttentionOptions, prefill_attention

Pair = tuple[torch.Tensor, torch.Tensor]  # K and V [kv_heads, n, head_dim]
Layers = list[Pair]  # of each layer


class TrainingStep(ForwardContext):
    """The batch under way: sequences of these lengths, one behind the other, all under slot 1."""

    def __init__(self) -> None:
        super().__init__()
        self.lengths: list[int] = []  # type: ignore[assignment]  # of sequences, where serving has rows' own
        self.start: Layers = []  # K and V of virtual tokens before each sequence; empty: none
        self.leads = False  # the first sequence is the virtual tokens
        self.kept: list[torch.Tensor] = []  # of each sequence, which of its tokens the last layer asks for
        self.seen: Layers | None = None  # where K and V of the batch are kept, if anybody asks

    def begin_with(self, start: Start | None) -> None:
        """Put these K and V before each sequence from now on."""
        if start is None:
            self.start = []
            return
        keys, values = start.keys.transpose(1, 2).unbind(), start.values.transpose(1, 2).unbind()
        self.start = list(zip(keys, values, strict=True))

    def attend(
        self,
        layer: int,
        q: torch.Tensor,  # [T, heads, head_dim], or if `kept` of those alone
        k: torch.Tensor,  # [T, kv_heads, head_dim]
        v: torch.Tensor,
        scores: AttentionOptions,
        *,
        kept: bool = False,
    ) -> torch.Tensor:
        """What each token sees of its own sequence, and of the virtual tokens before it; shaped as q.

        `kept`: only the tokens of `self.kept` ask.
        """
        if self.seen is not None:
            self.seen.append((k.transpose(0, 1), v.transpose(0, 1)))
        before = self.start[layer] if self.start else None
        # split, not sliced: the gradients come back as one concatenation
        queries = torch.split(q, [len(own) for own in self.kept] if kept else self.lengths)
        keys, values = (torch.split(x.transpose(0, 1), self.lengths, 1) for x in (k, v))
        out = []
        for i, (query, key, value) in enumerate(zip(queries, keys, values, strict=True)):
            past = (key, value) if before is None else _behind(before, (key, value))
            at = self.kept[i] + past[0].shape[1] - self.lengths[i] if kept else None
            out.append(prefill_attention(query, *past, scores, at) if len(query) else query)
            if i == 0 and self.leads:
                before = past
        return torch.cat(out)


def attend_within(
    module: Any,
    query: torch.Tensor,  # [1, heads, T, head_dim]
    key: torch.Tensor,  # [1, kv_heads, T, head_dim]
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """What transformers calls for each layer: [1, T, heads, head_dim]. Raises UnsupportedModel."""
    step: TrainingStep = module.polypeft_step
    scores = read_attention_options(module, step, query, attention_mask, options)
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    return step.attend(module.layer_idx, q, k, v, scores)[None], None


def _behind(before: Pair, own: Pair) -> Pair:
    key, value = (torch.cat(pair, 1) for pair in zip(before, own, strict=True))
    return key, value
