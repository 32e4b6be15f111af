"""A step's attention: which token belongs to which row, where its K/V go, and what it may see.

transformers' attention classes call `attend`; it finds the step under way on the module. Pages are laid out
in server/kernels/cpu/paged_attention.py; which blocks a row owns was decided by the scheduler (engine/kv.py).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from server.adapters.methods.interface import Bank
from server.adapters.methods.token_spans import Span, TokenSpans
from server.adapters.sites import Base
from server.engine.model.batch_tables import GpuBatch
from server.engine.scheduling.row import Row
from server.errors import UnsupportedModel
from server.kernels.cpu.decode_attention import decode_attention, takes
from server.kernels.cpu.paged_attention import (
    BLOCK,
    AttentionOptions,
    gather_pages,
    prefill_attention,
    write_pages,
)

PAIRS = 1 << 16  # of a row's tokens and what they see, at most: up to there a gathered past saves nothing


class Spans:
    """Which tokens each bank is asked about."""

    def __init__(self) -> None:
        self.by_bank: dict[Bank, list[Span]] = {}

    def add(self, banks: Mapping[str, Bank], row: Row, start: int, end: int) -> None:
        """Tokens [start, end) are this row's."""
        for use, slot in zip(row.uses, row.slots, strict=True):
            bank = banks[use.adapter.method]
            if bank.virtual_tokens_only and row.computed >= row.virtual:
                continue
            self.by_bank.setdefault(bank, []).append(Span(slot, start, end, use.weight))

    def acting(self, hook: str, count: int) -> list[tuple[Bank, TokenSpans]]:
        """Those of them that act through `hook`, which sees `count` tokens."""
        return [
            (bank, TokenSpans(spans, bank.max_span, count))
            for bank, spans in self.by_bank.items()
            if bank.acts(hook, (span.slot for span in spans))
        ]


class KvPages:
    """K and V of all layers, in blocks; as many blocks as the byte budget holds."""

    def __init__(self, base: Base, device: torch.device, dtype: torch.dtype, budget: int) -> None:
        per_block = 2 * base.layers * base.kv_heads * base.head_dim * BLOCK * dtype.itemsize
        self.count = max(budget // per_block, 2)
        shape = (self.count, base.kv_heads)
        # Zeroed: a page never shows what an earlier process left in memory.
        self.keys = [
            torch.zeros(*shape, base.head_dim, BLOCK, device=device, dtype=dtype) for _ in range(base.layers)
        ]
        self.values = [
            torch.zeros(*shape, BLOCK, base.head_dim, device=device, dtype=dtype) for _ in range(base.layers)
        ]


@dataclass(frozen=True)
class PrefillChunk:
    """A row in prefill: its tokens [start, end) of the packed batch end a past of `length` tokens."""

    start: int
    end: int
    length: int
    blocks: torch.Tensor  # int64
    places: torch.Tensor  # int64 [end - start]: where their K/V go


class ForwardContext:
    """The batch under way, as the model's modules need it: one object, refilled each step.

    Packed tokens: | rows that read their past in place | chunk of a row in prefill | chunk | ...
    """

    pages: KvPages
    batch: GpuBatch | None = None  # where a GPU's kernels run: all they need of the rows, on the device

    def __init__(self, *, gpu: bool = False) -> None:
        self.gpu = gpu
        self.banks: Mapping[str, Bank] = {}
        self.attended: set[int] = set()  # layers of the model that have attended in this step
        # int64 [T]: how long the row of each token is, where rotary scaling depends on it (rotary.py); None:
        # as long as the token's position says
        self.row_lengths: torch.Tensor | None = None
        # banks with rows in this batch, by the hook they act through; `head`: at the tokens sampled from
        self.affine: list[tuple[Bank, TokenSpans]] = []
        self.inputs: list[tuple[Bank, TokenSpans]] = []
        self.norm: list[tuple[Bank, TokenSpans]] = []
        self.head: list[tuple[Bank, TokenSpans]] = []
        self.head_inputs: list[tuple[Bank, TokenSpans]] = []
        self.head_norm: list[tuple[Bank, TokenSpans]] = []
        self.sublayer: list[tuple[Bank, TokenSpans]] = []
        self.watched = False  # each call of these banks is timed
        self.residual = torch.empty(0)  # the stream before the sub-block under way
        self.most_pairs = PAIRS
        self.in_place = 0  # tokens that read their past from the pages as they lie
        self.ahead: torch.Tensor | None = None  # where their K/V go, if some see others of the same step
        self.tables = torch.empty(0)
        self.lengths = torch.empty(0)
        self.chunks: list[PrefillChunk] = []
        self.heard: dict[
            int, AttentionOptions
        ] = {}  # of each layer, how the model's own class last asked for it
        self.last: dict[str, int] = {}  # row id -> its last token's place in the batch

    def begin(self, rows: list[Row], device: torch.device) -> None:
        """`rows` in the order of their tokens, as `order` gives it."""
        first = [row for row in rows if self.reads_in_place(row)]
        self.in_place = sum(row.scheduled for row in first)
        self.chunks = []
        if self.gpu:
            self.batch = GpuBatch.of(rows, device)
        else:
            self._find_pages(first, device)
        self.last = {}
        spans = Spans()
        start = 0
        for row in rows:
            end = start + row.scheduled
            if not self.gpu and start >= self.in_place:
                self.chunks.append(chunk_of(row, start, end, device))
            spans.add(self.banks, row, start, end)
            self.last[row.id] = end - 1
            start = end
        self.affine, self.inputs, self.norm, self.sublayer = (
            spans.acting(hook, start) for hook in ("affine", "inputs", "norm", "sublayer")
        )

    def order(self, rows: list[Row]) -> list[Row]:
        """Those that read their past in place come first."""
        return sorted(rows, key=lambda row: not self.reads_in_place(row))

    def reads_in_place(self, row: Row) -> bool:
        """Row by row, so that no row's result depends on the others of its batch."""
        pairs = row.scheduled * (row.computed + row.scheduled)
        return row.decodes or (pairs <= self.most_pairs and not self.gpu and takes(self.pages.keys[0]))

    def _find_pages(self, rows: list[Row], device: torch.device) -> None:
        self.ahead = None
        if not rows:
            return
        most = max(len(row.blocks) for row in rows)
        tables = [[row.blocks + [0] * (most - len(row.blocks))] * row.scheduled for row in rows]
        self.tables = torch.tensor([table for own in tables for table in own], device=device)
        lengths = [row.computed + 1 + i for row in rows for i in range(row.scheduled)]
        self.lengths = torch.tensor(lengths, device=device)
        if any(row.scheduled > 1 for row in rows):
            own = [(row.blocks, row.computed, row.computed + row.scheduled) for row in rows]
            self.ahead = torch.cat([places_of(*span, device) for span in own])

    def attention(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scores: AttentionOptions
    ) -> torch.Tensor:
        """[T, heads, head_dim]; q is such, k and v [T, kv_heads, head_dim], which go to their pages."""
        keys, values = self.pages.keys[layer], self.pages.values[layer]
        if self.batch is not None:
            return self.batch.attend(q, k, v, keys, values, scores)
        parts = []
        if n := self.in_place:
            new = (q[:n], k[:n], v[:n])
            if self.ahead is not None:  # a token sees those before it, which another thread may compute
                write_pages(keys, values, k[:n], v[:n], self.ahead)
            parts.append(decode_attention(*new, keys, values, self.tables, self.lengths, scores))
        for chunk in self.chunks:
            span = slice(chunk.start, chunk.end)
            write_pages(keys, values, k[span], v[span], chunk.places)
            if chunk.length == chunk.end - chunk.start:
                past_k, past_v = k[span].transpose(0, 1), v[span].transpose(0, 1)
            else:
                past_k, past_v = gather_pages(keys, values, chunk.blocks, chunk.length)
            parts.append(prefill_attention(q[span], past_k, past_v, scores))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def keep(self, rows: list[Row]) -> None:
        """The output head sees one token of each row that completes, in the order given."""
        spans = Spans()
        start = 0
        for row in (row for row in rows if row.completes):
            end = start + 1 + len(row.guess)
            spans.add(self.banks, row, start, end)
            start = end
        self.head, self.head_inputs, self.head_norm = (
            spans.acting(hook, start) for hook in ("affine", "inputs", "norm")
        )


def chunk_of(row: Row, start: int, end: int, device: torch.device) -> PrefillChunk:
    length = row.computed + row.scheduled
    blocks = torch.tensor(row.blocks[: -(-length // BLOCK)], device=device)
    return PrefillChunk(start, end, length, blocks, places_of(row.blocks, row.computed, length, device))


def places_of(blocks: list[int], first: int, end: int, device: torch.device) -> torch.Tensor:
    """Where the K/V of a row's tokens [first, end) lie in the pages."""
    at = torch.arange(first, end, device=device)
    return torch.tensor(blocks, device=device)[at // BLOCK] * BLOCK + at % BLOCK


# Arguments of transformers' attention functions that do not change the result, with the values that do not.
# All others must be null.
WITHOUT_EFFECT: dict[str, Callable[[Any], bool]] = {
    "dropout": lambda value: not value,
    "is_causal": bool,
    "output_attentions": lambda value: not value,
    "output_router_logits": lambda _: True,  # with the model's outputs
    "use_cache": lambda _: True,
    "position_ids": lambda _: True,  # what depends on positions has been done to q and k
    "cache_position": lambda _: True,
}


def attend(
    module: Any,
    query: torch.Tensor,  # [1, heads, T, head_dim]
    key: torch.Tensor,  # [1, kv_heads, T, head_dim]
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """What transformers calls for each layer: [1, T, heads, head_dim]. Raises UnsupportedModel."""
    step: ForwardContext = module.polypeft_step
    layer: int = module.layer_idx
    scores = scores_of(module, step, query, attention_mask, options)
    q, k, v = query[0].transpose(0, 1), key[0].transpose(0, 1), value[0].transpose(0, 1)
    heads, dim = step.pages.values[layer].shape[1::2]
    if not k.shape == v.shape == (len(q), heads, dim) or q.shape[2] != dim or q.shape[1] % heads:
        raise UnsupportedModel(
            f"layer {layer} has {k.shape[1]} key heads of {k.shape[2]} and values of {v.shape[2]} numbers, "
            f"where its config says {heads} of {dim}"
        )
    if layer in step.attended:
        raise UnsupportedModel(f"its layer {layer} attends more than once a step")
    step.attended.add(layer)
    return step.attention(layer, q, k, v, scores)[None], None


def scores_of(
    module: Any, step: ForwardContext, query: torch.Tensor, mask: torch.Tensor | None, options: dict[str, Any]
) -> AttentionOptions:
    """What a layer asks of attention; noted in `step.heard`.

    Raises UnsupportedModel if it asks for anything else.
    """
    known = {name: options.pop(name, None) for name in ("scaling", "sliding_window", "softcap")}
    if mask is not None:
        options["attention_mask"] = mask
    for name, value in options.items():
        if value is not None and not WITHOUT_EFFECT.get(name, lambda _: False)(value):
            raise UnsupportedModel(f"its attention uses {name}, which is not implemented")
    scale = query.shape[-1] ** -0.5 if known["scaling"] is None else known["scaling"]
    scores = AttentionOptions(scale, known["sliding_window"] or 0, known["softcap"] or 0.0)
    step.heard[module.layer_idx] = scores
    return scores
