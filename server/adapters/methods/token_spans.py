"""The tokens of a batch by adapter slot, as banks and kernels see them."""

from collections import Counter
from collections.abc import Callable
from functools import cached_property
from typing import NamedTuple

import torch

from server.kernels.token_blocks import (
    BLOCK_FIELDS,
    LARGE_BLOCK,
    SMALL_BLOCK,
    BlockPlan,
    put_in_blocks,
    round_up,
)
from server.kernels.transfers import upload

MAX_DECODE_SPAN = 8  # tokens of a row; up to here, streaming its adapter's weights beats a GEMM


class Span(NamedTuple):
    """Consecutive tokens [start, end) of one adapter. A row with several adapters has several spans."""

    slot: int
    start: int
    end: int
    weight: float = 1.0


# How an adapter changes a site, as bits: by a bias alone, element by element, by matrices.
BIAS, SCALE, MATRICES = 1, 2, 4


class TokenSpans:
    """Which slot each token of a batch uses. Slot 0 is "no adapter"; tokens of the base are in no span.

    `kernel_spans`, which the bank's kernels compute: those of up to `max_span` tokens (decode), ordered by
    slot so that rows of one adapter find its weights in the CPU's cache. `other_spans` are computed one by
    one: longer ones, and rows with several or weighted adapters, whose terms are added in a fixed order.
    """

    def __init__(self, spans: list[Span], max_span: int = MAX_DECODE_SPAN, count: int | None = None) -> None:
        """`count`: tokens of the batch that the hooks see; None if unknown."""
        sharing = Counter(span.start for span in spans)
        self.kernel_spans = sorted(
            s for s in spans if s.end - s.start <= max_span and s.weight == 1 and sharing[s.start] == 1
        )
        in_kernels = set(self.kernel_spans)
        self.spans = spans
        self.count = count
        self.touched: dict[str, int] | None = None  # site -> how adapters change it; the bank fills it in
        self.applied: set[str] = set()  # sites that the bank has done already, together with a sibling
        self.bias_applied: set[str] = set()  # sites whose biases the base's own kernel has added
        self.other_spans = [span for span in spans if span not in in_kernels]
        self._plan: BlockPlan | None = None
        self._by_token: torch.Tensor | None = None

    @classmethod
    def of_graph(cls, plan: BlockPlan, touched: dict[str, int], count: int) -> "TokenSpans":
        """For a CUDA graph of `count` tokens. At each replay, the plan's tensors hold the tokens' slots."""
        rows = cls([], count=count)
        rows._plan, rows.touched = plan, touched
        return rows

    @classmethod
    def of_recorded_step(cls, count: int, touched: dict[str, int]) -> "TokenSpans":
        """For a recorded CPU step of `count` tokens. `copy_from` sets their slots before each replay."""
        rows = cls([], count=count)
        rows.tokens, rows.slots, rows._by_token = torch.zeros(3, count, dtype=torch.int64).unbind()
        rows.touched = touched
        return rows

    def copy_from(self, rows: "TokenSpans") -> None:
        """Take over the kernel spans of `rows`, in place; slot 0 for tokens beyond them."""
        assert self._by_token is not None
        count = len(rows.tokens)
        for target, source in ((self.tokens, rows.tokens), (self.slots, rows.slots)):
            target[:count] = source
            target[count:] = 0  # slot 0 is empty
        self._by_token.copy_(rows.by_token(len(self._by_token)))

    def check_count(self, count: int) -> None:
        """Raises RuntimeError if a module sees another number of tokens: kernels would leave their memory."""
        if self.count is not None and count != self.count:
            raise RuntimeError(f"a module saw {count} tokens in a step of {self.count}")

    @cached_property
    def tokens(self) -> torch.Tensor:
        """int64 [n]: the tokens of `kernel_spans`."""
        return torch.tensor([t for s in self.kernel_spans for t in range(s.start, s.end)], dtype=torch.int64)

    @cached_property
    def slots(self) -> torch.Tensor:
        """int64 [n]: the slot of each of `tokens`."""
        return torch.tensor(
            [s.slot for s in self.kernel_spans for _ in range(s.start, s.end)], dtype=torch.int64
        )

    def by_token(self, count: int) -> torch.Tensor:
        """int64 [count]: the slot of every token of the batch; 0 outside of `kernel_spans`."""
        if self._by_token is None:
            self._by_token = torch.zeros(count, dtype=torch.int64)
            self._by_token[self.tokens] = self.slots
        return self._by_token

    def block_plan(self, device: torch.device, ranks: Callable[[int], int]) -> BlockPlan:
        """The tokens of `kernel_spans` in blocks for GPU kernels. `ranks`: slot -> highest rank or width."""
        if self._plan is None:
            longest = max((s.end - s.start for s in self.kernel_spans), default=0)
            size = SMALL_BLOCK if longest <= SMALL_BLOCK else LARGE_BLOCK
            order, blocks = put_in_blocks((s[:3] for s in self.kernel_spans), size)
            highest = max((ranks(s.slot) for s in self.kernel_spans), default=0)
            tables = upload([order, blocks], device)
            self._plan = BlockPlan(tables[0], tables[1].view(-1, BLOCK_FIELDS), size, round_up(highest))
        return self._plan

    def gather(
        self, of_slot: Callable[[int], torch.Tensor | None]
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """A tensor of each token's adapter: (tokens [n], tensors [n, ...]) of all slots for which `of_slot`
        gives one; None if it gives none.
        """
        pairs = [
            (tensor, token)
            for span in self.spans
            if (tensor := of_slot(span.slot)) is not None
            for token in range(span.start, span.end)
        ]
        if not pairs:
            return None
        return torch.tensor([token for _, token in pairs]), torch.stack([tensor for tensor, _ in pairs])
