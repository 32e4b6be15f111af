"""The batch as banks see it: which tokens are under which slot."""

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

MAX_DECODE_SPAN = 8  # up to so many tokens of one row, walking its weights beats a GEMM


class Span(NamedTuple):
    """A run of tokens under one adapter. Tokens of a row that names several stand in several spans."""

    slot: int
    start: int
    end: int
    weight: float = 1.0


# How an adapter changes a site; the ways of several are or-ed.
BIAS, SCALE, MATRICES = 1, 2, 4  # by a bias and nothing else; element by element; by matrices


class TokenSpans:
    """The batch as banks see it: which slot each packed token uses. Slot 0 is "no adapter".

    Base tokens are in no span. Spans of up to `most` tokens (decode) are what kernels take: `few`, ordered by
    slot so that rows that share an adapter find its weights in the cache. The others stay spans in `many`:
    longer ones, and rows with several or weighted adapters, whose sums have an order.
    """

    def __init__(self, spans: list[Span], most: int = MAX_DECODE_SPAN, count: int | None = None) -> None:
        """`count`: tokens that the hooks see; None: not known."""
        sharing = Counter(span.start for span in spans)
        self.few = sorted(
            s for s in spans if s.end - s.start <= most and s.weight == 1 and sharing[s.start] == 1
        )
        kept = set(self.few)
        self.spans = spans
        self.count = count
        self.touched: dict[str, int] | None = None  # the sites its adapters change; the bank fills it in
        self.settled: set[str] = set()  # sites that the bank has done already, along with a sibling
        self.biased: set[str] = set()  # sites whose biases have come with the product
        self.many = [span for span in spans if span not in kept]
        self._plan: BlockPlan | None = None
        self._by_token: torch.Tensor | None = None

    @classmethod
    def recorded(cls, plan: BlockPlan, touched: dict[str, int], count: int) -> "TokenSpans":
        """Of a recorded step of `count` tokens: whose they are, the plan's tensors say at each replay."""
        rows = cls([], count=count)
        rows._plan, rows.touched = plan, touched
        return rows

    @classmethod
    def held(cls, count: int, touched: dict[str, int]) -> "TokenSpans":
        """The same on a CPU, of `count` tokens: what `fill` says then."""
        rows = cls([], count=count)
        rows.tokens, rows.slots, rows._by_token = torch.zeros(3, count, dtype=torch.int64).unbind()
        rows.touched = touched
        return rows

    def fill(self, rows: "TokenSpans") -> None:
        """Say as `rows` does; 0 where it says nothing."""
        assert self._by_token is not None
        count = len(rows.tokens)
        for own, other in ((self.tokens, rows.tokens), (self.slots, rows.slots)):
            own[:count] = other
            own[count:] = 0  # slot 0 holds nothing
        self._by_token.copy_(rows.by_token(len(self._by_token)))

    def check(self, count: int) -> None:
        """Raises RuntimeError if a module sees other tokens than the batch's: no kernel may address those."""
        if self.count is not None and count != self.count:
            raise RuntimeError(f"a module saw {count} tokens in a step of {self.count}")

    @cached_property
    def tokens(self) -> torch.Tensor:
        """int64: the tokens of `few`."""
        return torch.tensor([t for s in self.few for t in range(s.start, s.end)], dtype=torch.int64)

    @cached_property
    def slots(self) -> torch.Tensor:
        """int64: the slot of each of these tokens."""
        return torch.tensor([s.slot for s in self.few for _ in range(s.start, s.end)], dtype=torch.int64)

    def by_token(self, count: int) -> torch.Tensor:
        """int64 [count]: the slot of each of the batch's tokens; 0 for those that are not in `few`."""
        if self._by_token is None:
            self._by_token = torch.zeros(count, dtype=torch.int64)
            self._by_token[self.tokens] = self.slots
        return self._by_token

    def plan(self, device: torch.device, ranks: Callable[[int], int]) -> BlockPlan:
        """The tokens of `few` in blocks, on a GPU; `ranks` gives a slot's highest rank or width."""
        if self._plan is None:
            longest = max((s.end - s.start for s in self.few), default=0)
            size = SMALL_BLOCK if longest <= SMALL_BLOCK else LARGE_BLOCK
            order, blocks = put_in_blocks((s[:3] for s in self.few), size)
            highest = max((ranks(s.slot) for s in self.few), default=0)
            own = upload([order, blocks], device)
            self._plan = BlockPlan(own[0], own[1].view(-1, BLOCK_FIELDS), size, round_up(highest))
        return self._plan

    def spread(
        self, of_slot: Callable[[int], torch.Tensor | None]
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """What each token's adapter has: (tokens [n], of_slot's tensors [n, ...]); None if nobody has any."""
        found = [
            (own, t)
            for span in self.spans
            if (own := of_slot(span.slot)) is not None
            for t in range(span.start, span.end)
        ]
        if not found:
            return None
        return torch.tensor([t for _, t in found]), torch.stack([own for own, _ in found])
