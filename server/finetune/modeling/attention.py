"""Attention over a packed batch in training: each sequence attends to itself, by the kernel of serving's
prefill.

Virtual tokens precede every sequence and attend to each other only. So a layer's output for them is the same
for all sequences and is computed once a batch. In prefix tuning their K and V are the parameters; in prompt
tuning they are the first sequence of the batch, and all others attend to its K and V.
"""

from typing import Any

import torch

from server.adapters.methods.interface import Start
from server.engine.model.attention import read_attention_options
from server.engine.model.forward_context import ForwardContext
from server.kernels.cpu.paged_attention import AttentionOptions, prefill_attention

Pair = tuple[torch.Tensor, torch.Tensor]  # K and V [kv_heads, n, head_dim]
Layers = list[Pair]  # one for each layer


class TrainingStep(ForwardContext):
    """The forward context of one packed batch of T tokens; all tokens use slot 1."""

    def __init__(self) -> None:
        super().__init__()
        self.lengths: list[int] = []  # type: ignore[assignment]  # of the sequences; serving has a tensor here
        self.virtual_kv: Layers = []  # K and V of virtual tokens before each sequence; empty: none
        self.starts_with_virtual_tokens = False  # the first sequence is the virtual tokens
        self.selected: list[torch.Tensor] = []  # int64, by sequence: its tokens that the last layer computes
        self.recorded_kv: Layers | None = None  # if a list: `attend` appends the K and V of each layer

    def set_virtual_kv(self, start: Start | None) -> None:
        """Put these K and V of virtual tokens before each sequence; None: no virtual tokens."""
        if start is None:
            self.virtual_kv = []
            return
        keys, values = start.keys.transpose(1, 2).unbind(), start.values.transpose(1, 2).unbind()
        self.virtual_kv = list(zip(keys, values, strict=True))

    def attend(
        self,
        layer: int,
        q: torch.Tensor,  # [T, heads, head_dim]; with `selected` of those tokens only
        k: torch.Tensor,  # [T, kv_heads, head_dim]
        v: torch.Tensor,
        scores: AttentionOptions,
        *,
        selected: bool = False,
    ) -> torch.Tensor:
        """Attention of each token over its sequence and the virtual tokens before it; shaped as q.

        With `selected`, q has the tokens of `self.selected` only.
        """
        if self.recorded_kv is not None:
            self.recorded_kv.append((k.transpose(0, 1), v.transpose(0, 1)))
        virtual = self.virtual_kv[layer] if self.virtual_kv else None
        # split, not sliced: the gradients come back as one concatenation
        queries = torch.split(q, [len(indices) for indices in self.selected] if selected else self.lengths)
        keys, values = (torch.split(x.transpose(0, 1), self.lengths, 1) for x in (k, v))
        out = []
        for i, (query, key, value) in enumerate(zip(queries, keys, values, strict=True)):
            past = (key, value) if virtual is None else _concatenate(virtual, (key, value))
            positions = self.selected[i] + past[0].shape[1] - self.lengths[i] if selected else None
            out.append(prefill_attention(query, *past, scores, positions) if len(query) else query)
            if i == 0 and self.starts_with_virtual_tokens:
                virtual = past
        return torch.cat(out)


def attend_within(
    module: Any,
    query: torch.Tensor,  # [1, heads, T, head_dim]
    key: torch.Tensor,  # [1, kv_heads, T, head_dim]
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """The attention function that transformers calls in each layer: [1, T, heads, head_dim].

    Raises UnsupportedModel.
    """
    step: TrainingStep = module.polypeft_step
    scores = read_attention_options(module, step, query, attention_mask, options)
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    return step.attend(module.layer_idx, q, k, v, scores)[None], None


def _concatenate(first: Pair, second: Pair) -> Pair:
    key, value = (torch.cat(pair, 1) for pair in zip(first, second, strict=True))
    return key, value
