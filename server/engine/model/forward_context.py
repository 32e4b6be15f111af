"""Metadata of one forward pass: which token belongs to which row, where its K/V go, and what it may see.

The model's modules read it. Only this file writes it, by one method for each kind of step: `begin_eager`,
`begin_graph`, `recording` (a CPU step), and while no row runs `begin_prompt` and `begin_timing`. Modules
note in it, as they run, the `residual` stream and which layers `attended` with which `attention_options`.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch

from server.adapters.methods.interface import HEAD_HOOKS, HOOKS, Bank
from server.adapters.methods.token_spans import Span, TokenSpans
from server.engine.model.batch_tables import GpuBatch
from server.engine.model.kv_pages import KvPages, PrefillChunk, kv_positions, prefill_chunk
from server.engine.scheduling.row import Row
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

ActingBanks = list[tuple[Bank, TokenSpans]]  # banks with rows in the batch, each with its tokens
# By hook: the field for the tokens that get logits; the one for all tokens has the name of the hook.
AT_HEAD = {hook: f"head_{hook}" for hook in HEAD_HOOKS}


class SpansByBank:
    """The token spans of one forward pass, grouped by the bank that holds their adapters."""

    def __init__(self) -> None:
        self.by_bank: dict[Bank, list[Span]] = {}

    def add(self, banks: Mapping[str, Bank], row: Row, start: int, end: int) -> None:
        """Assign packed tokens [start, end) to the adapters of `row`."""
        for use, slot in zip(row.uses, row.slots, strict=True):
            bank = banks[use.adapter.method]
            if bank.virtual_tokens_only and row.computed >= row.num_virtual_tokens:
                continue
            self.by_bank.setdefault(bank, []).append(Span(slot, start, end, use.weight))

    def acting(self, hook: str, count: int) -> ActingBanks:
        """Banks that act through `hook`, which sees `count` tokens, each with its spans."""
        return [
            (bank, TokenSpans(spans, bank.max_span, count))
            for bank, spans in self.by_bank.items()
            if bank.acts(hook, (span.slot for span in spans))
        ]


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
        # By hook: at all tokens, then at those that get logits (AT_HEAD)
        self.affine: ActingBanks = []
        self.inputs: ActingBanks = []
        self.norm: ActingBanks = []
        self.sublayer: ActingBanks = []
        self.head_affine: ActingBanks = []
        self.head_inputs: ActingBanks = []
        self.head_norm: ActingBanks = []
        self.timed = False  # every call of these banks is timed
        # [1, T, hidden] or [T, hidden]: the stream before the current sub-block, which its norm's hook notes
        self.residual = torch.empty(0)
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

    def install(self, banks: Mapping[str, Bank]) -> None:
        """Set the banks whose adapters rows may name, by method."""
        self.banks = banks

    def set_pages(self, pages: KvPages) -> None:
        """Set the KV cache."""
        self.pages = pages

    def limit_in_place(self, pairs: int = MAX_IN_PLACE_PAIRS) -> None:
        """Let rows of more query x key pairs gather their past; rows that decode never do."""
        self.max_in_place_pairs = pairs

    def begin_eager(self, rows: list[Row], device: torch.device, *, by_row_length: bool = False) -> None:
        """Fill the context with a batch of `rows`, sorted by `order`.

        `by_row_length`: rotary scaling depends on the lengths of rows.
        """
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
        for hook in HOOKS:
            setattr(self, hook, spans.acting(hook, start))
        if by_row_length:
            lengths = [row.length for row in rows for _ in range(row.scheduled)]
            self.row_lengths = torch.tensor(lengths, device=device)

    def begin_graph(self, batch: GpuBatch, acting: ActingBanks) -> None:
        """Set a step that is recorded as a CUDA graph: each row decodes one token, which gets logits.

        `batch` and the banks' spans read the graph's tables.
        """
        self.batch = batch
        self.in_place, self.chunks, self.last_token, self.row_lengths = len(batch.lengths), [], {}, None
        for hook in HOOKS:
            setattr(self, hook, [(bank, rows) for bank, rows in acting if bank.acts(hook, ())])
        for hook, at_head in AT_HEAD.items():
            setattr(self, at_head, getattr(self, hook))

    @contextmanager
    def recording(
        self,
        tables: torch.Tensor,
        lengths: torch.Tensor,
        kv_positions: torch.Tensor | None,
        affine: ActingBanks,
        sublayer: ActingBanks,
    ) -> Iterator[None]:
        """Inside, the step reads these buffers of a recorded CPU step, shaped as the fields they replace."""
        before = (self.tables, self.lengths, self.kv_positions, self.affine, self.sublayer)
        self.tables, self.lengths, self.kv_positions = tables, lengths, kv_positions
        self.affine, self.sublayer = affine, sublayer
        try:
            yield
        finally:
            self.tables, self.lengths, self.kv_positions, self.affine, self.sublayer = before

    def begin_prompt(self, count: int) -> None:
        """Set a prompt of `count` tokens in the first block, on a CPU and without adapters."""
        assert count <= BLOCK
        device = torch.device("cpu")
        positions = kv_positions([0], 0, count, device)
        self.in_place, self.chunks = 0, [PrefillChunk(0, count, count, torch.tensor([0]), positions)]

    def begin_timing(self, count: int, blocks: list[int]) -> None:
        """Set a step of `count` tokens on a CPU, without adapters, all of one past: that in `blocks`."""
        zeros = torch.zeros(count, dtype=torch.int64)
        self.in_place, self.chunks, self.kv_positions, self.row_lengths = count, [], None, None
        self.tables, self.lengths = torch.tensor([blocks] * count), zeros + len(blocks) * BLOCK
        for name in (*HOOKS, *AT_HEAD.values()):
            setattr(self, name, [])
        self.timed = False

    def begin_pass(self) -> None:
        """Called before each run of the model's layers."""
        self.attended.clear()

    def time_banks(self, timed: Callable[[Bank], Bank] | None) -> None:
        """Replace the banks of the current step by timed ones; None: they are not timed."""
        self.timed = timed is not None
        if timed:
            for name in (*HOOKS, *AT_HEAD.values()):
                acting: ActingBanks = getattr(self, name)
                setattr(self, name, [(timed(bank), rows) for bank, rows in acting])

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
        """Set the banks of the output head for the tokens to sample from: of each row that completes, its
        last token and its draft tokens.
        """
        self.select_head_tokens((row, 1 + len(row.draft)) for row in rows if row.completes)

    def select_head_tokens(self, counts: Iterable[tuple[Row, int]]) -> None:
        """Set the banks of the output head, which sees, in this order, so many tokens of each row."""
        spans = SpansByBank()
        start = 0
        for row, count in counts:
            end = start + count
            spans.add(self.banks, row, start, end)
            start = end
        for hook, at_head in AT_HEAD.items():
            setattr(self, at_head, spans.acting(hook, start))
