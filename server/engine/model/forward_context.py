"""Metadata of one forward pass: which token belongs to which row, where its K/V go, and what it may see.

transformers' attention classes call `attend`, which finds the context on the module (`polypeft_step`). The
layout of pages is drawn in server/kernels/cpu/paged_attention.py; the scheduler decides which blocks a row
owns (scheduling/kv_blocks.py).
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
from server.kernels.cpu.decode_attention import decode_attention, supports_pages
from server.kernels.cpu.paged_attention import (
    BLOCK,
    AttentionOptions,
    gather_pages,
    prefill_attention,
    write_pages,
)

# Query x key pairs of a row: up to this many, reading its pages in place is as fast as gathering them first.
MAX_IN_PLACE_PAIRS = 1 << 16


class SpansByBank:
    """The token spans of one forward pass, grouped by the bank that holds their adapters."""

    def __init__(self) -> None:
        self.by_bank: dict[Bank, list[Span]] = {}

    def add(self, banks: Mapping[str, Bank], row: Row, start: int, end: int) -> None:
        """Assign packed tokens [start, end) to the adapters of `row`."""
        for use, slot in zip(row.uses, row.slots, strict=True):
            bank = banks[use.adapter.method]
            if bank.leads and row.computed >= row.virtual:
                continue
            self.by_bank.setdefault(bank, []).append(Span(slot, start, end, use.weight))

    def acting(self, hook: str, count: int) -> list[tuple[Bank, TokenSpans]]:
        """Banks that act through `hook`, which sees `count` tokens, each with its spans."""
        return [
            (bank, TokenSpans(spans, bank.most, count))
            for bank, spans in self.by_bank.items()
            if bank.acts(hook, (span.slot for span in spans))
        ]


class KvPages:
    """K and V of all layers, in blocks: as many blocks as fit into `budget` bytes, at least two.

    Of each layer keys [blocks, kv_heads, head_dim, BLOCK] and values [blocks, kv_heads, BLOCK, head_dim].
    """

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
    """Tokens [start, end) of the packed batch, of one row in prefill: the last of its `length` tokens."""

    start: int
    end: int
    length: int  # tokens of the row so far, this chunk included
    blocks: torch.Tensor  # int64: the row's blocks, in order
    kv_positions: torch.Tensor  # int64 [end - start]: where their K/V are written (see `kv_positions`)


class ForwardContext:
    """The current batch as the model's modules need it: one object, refilled for each step.

    Packed tokens: | rows that read their past in place | chunk of a row in prefill | chunk | ...
    """

    pages: KvPages
    batch: GpuBatch | None = None  # on a GPU: everything its kernels need of the rows, on the device

    def __init__(self, *, gpu: bool = False) -> None:
        self.gpu = gpu
        self.banks: Mapping[str, Bank] = {}  # by method
        self.attended: set[int] = set()  # layers that have attended in this step
        # int64 [T]: the length of each token's row, where rotary scaling depends on it (rotary.py). None: a
        # token's row is as long as its position says
        self.row_lengths: torch.Tensor | None = None
        # Banks with rows in this batch, by the hook they act through. `head*`: at the tokens that get logits
        self.affine: list[tuple[Bank, TokenSpans]] = []
        self.inputs: list[tuple[Bank, TokenSpans]] = []
        self.norm: list[tuple[Bank, TokenSpans]] = []
        self.head: list[tuple[Bank, TokenSpans]] = []
        self.head_inputs: list[tuple[Bank, TokenSpans]] = []
        self.head_norm: list[tuple[Bank, TokenSpans]] = []
        self.sublayer: list[tuple[Bank, TokenSpans]] = []
        self.watched = False  # every call of these banks is timed
        self.residual = torch.empty(
            0
        )  # [1, T, hidden] or [T, hidden]: the stream before the current sub-block
        self.max_in_place_pairs = MAX_IN_PLACE_PAIRS
        self.in_place = 0  # tokens, from the first on, that read their past from the pages in place
        self.tables = torch.empty(0)  # int64 [in_place, most blocks]: the blocks of each such token's row
        self.lengths = torch.empty(0)  # int64 [in_place]: how many tokens each of them sees, itself included
        # int64 [in_place]: where their K/V are written, if some row has several of them; else None
        self.kv_positions: torch.Tensor | None = None
        self.chunks: list[PrefillChunk] = []
        # By layer: the options with which the model's own class last called `attend`
        self.attention_options: dict[int, AttentionOptions] = {}
        self.last_token: dict[str, int] = {}  # row id -> index of its last token in the batch

    def begin(self, rows: list[Row], device: torch.device) -> None:
        """Fill the context with a batch of `rows`, sorted by `order`."""
        in_place = [row for row in rows if self.reads_in_place(row)]
        self.in_place = sum(row.scheduled for row in in_place)
        self.chunks = []
        if self.gpu:
            self.batch = GpuBatch.of(rows, device)
        else:
            self._fill_in_place(in_place, device)
        self.last_token = {}
        spans = SpansByBank()
        start = 0
        for row in rows:
            end = start + row.scheduled
            if not self.gpu and start >= self.in_place:
                self.chunks.append(prefill_chunk(row, start, end, device))
            spans.add(self.banks, row, start, end)
            self.last_token[row.id] = end - 1
            start = end
        self.affine, self.inputs, self.norm, self.sublayer = (
            spans.acting(hook, start) for hook in ("affine", "inputs", "norm", "sublayer")
        )

    def order(self, rows: list[Row]) -> list[Row]:
        """The rows with those that read their past in place first."""
        return sorted(rows, key=lambda row: not self.reads_in_place(row))

    def reads_in_place(self, row: Row) -> bool:
        """Decided for each row alone, so that its result does not depend on the other rows of the batch."""
        pairs = row.scheduled * (row.computed + row.scheduled)
        return row.decodes or (
            pairs <= self.max_in_place_pairs and not self.gpu and supports_pages(self.pages.keys[0])
        )

    def _fill_in_place(self, rows: list[Row], device: torch.device) -> None:
        self.kv_positions = None
        if not rows:
            return
        width = max(len(row.blocks) for row in rows)
        tables = [[row.blocks + [0] * (width - len(row.blocks))] * row.scheduled for row in rows]
        self.tables = torch.tensor([table for of_row in tables for table in of_row], device=device)
        lengths = [row.computed + 1 + i for row in rows for i in range(row.scheduled)]
        self.lengths = torch.tensor(lengths, device=device)
        if any(row.scheduled > 1 for row in rows):
            spans = [(row.blocks, row.computed, row.computed + row.scheduled) for row in rows]
            self.kv_positions = torch.cat([kv_positions(*span, device) for span in spans])

    def attention(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: AttentionOptions
    ) -> torch.Tensor:
        """Write K and V to their pages and attend: [T, heads, head_dim].

        q [T, heads, head_dim]; k and v [T, kv_heads, head_dim].
        """
        keys, values = self.pages.keys[layer], self.pages.values[layer]
        if self.batch is not None:
            return self.batch.attend(q, k, v, keys, values, options)
        parts = []
        if n := self.in_place:
            new = (q[:n], k[:n], v[:n])
            if self.kv_positions is not None:  # a token sees tokens before it that another thread may compute
                write_pages(keys, values, k[:n], v[:n], self.kv_positions)
            parts.append(decode_attention(*new, keys, values, self.tables, self.lengths, options))
        for chunk in self.chunks:
            span = slice(chunk.start, chunk.end)
            write_pages(keys, values, k[span], v[span], chunk.kv_positions)
            if chunk.length == chunk.end - chunk.start:
                past_k, past_v = k[span].transpose(0, 1), v[span].transpose(0, 1)
            else:
                past_k, past_v = gather_pages(keys, values, chunk.blocks, chunk.length)
            parts.append(prefill_attention(q[span], past_k, past_v, options))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def select_logit_rows(self, rows: list[Row]) -> None:
        """Set the banks of the output head, which sees, in this order, the tokens that get logits: of each
        row that completes its last token, with the tokens guessed after it.
        """
        spans = SpansByBank()
        start = 0
        for row in (row for row in rows if row.completes):
            end = start + 1 + len(row.guess)
            spans.add(self.banks, row, start, end)
            start = end
        self.head, self.head_inputs, self.head_norm = (
            spans.acting(hook, start) for hook in ("affine", "inputs", "norm")
        )


def prefill_chunk(row: Row, start: int, end: int, device: torch.device) -> PrefillChunk:
    """The row's scheduled tokens, which are tokens [start, end) of the packed batch."""
    length = row.computed + row.scheduled
    blocks = torch.tensor(row.blocks[: -(-length // BLOCK)], device=device)
    return PrefillChunk(start, end, length, blocks, kv_positions(row.blocks, row.computed, length, device))


def kv_positions(blocks: list[int], first: int, end: int, device: torch.device) -> torch.Tensor:
    """int64 [end - first], block * BLOCK + offset: where K/V of a row's tokens [first, end) lie."""
    tokens = torch.arange(first, end, device=device)
    return torch.tensor(blocks, device=device)[tokens // BLOCK] * BLOCK + tokens % BLOCK


# Arguments of transformers' attention functions that do not change the result, each with a test of the values
# that do not. All other arguments must be None.
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
    """The attention function that transformers calls for each layer: [1, T, heads, head_dim].

    Raises UnsupportedModel if the layer asks for anything that is not implemented.
    """
    step: ForwardContext = module.polypeft_step
    layer: int = module.layer_idx
    attention_options = read_attention_options(module, step, query, attention_mask, options)
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
    return step.attention(layer, q, k, v, attention_options)[None], None


def read_attention_options(
    module: Any, step: ForwardContext, query: torch.Tensor, mask: torch.Tensor | None, options: dict[str, Any]
) -> AttentionOptions:
    """The options of a layer's call; also recorded in `step.attention_options`.

    Raises UnsupportedModel if the layer asks for anything else.
    """
    known = {name: options.pop(name, None) for name in ("scaling", "sliding_window", "softcap")}
    if mask is not None:
        options["attention_mask"] = mask
    for name, value in options.items():
        if value is not None and not WITHOUT_EFFECT.get(name, lambda _: False)(value):
            raise UnsupportedModel(f"its attention uses {name}, which is not implemented")
    scale = query.shape[-1] ** -0.5 if known["scaling"] is None else known["scaling"]
    attention_options = AttentionOptions(scale, known["sliding_window"] or 0, known["softcap"] or 0.0)
    step.attention_options[module.layer_idx] = attention_options
    return attention_options
