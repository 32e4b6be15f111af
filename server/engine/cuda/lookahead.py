"""Lookahead: on a GPU, launch the next decode step before the host has read the tokens of the current one.

A step's tokens are on the device as soon as they are sampled. The next replay reads them there and runs while
the host handles the current ones. Lookahead is speculative: the scheduler decides as usual, rows whose state
matches their precomputed logits reuse them, and all others are computed then. The logits of a row that has
ended meanwhile are dropped; the K/V written for it are harmless, because the next owner of its blocks
overwrites them later in the same stream.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from server.engine.cuda.cuda_graphs import DecodeGraphs
from server.engine.scheduling.row import Row
from server.kernels.transfers import send

Compute = Callable[[list[Row]], torch.Tensor]


@dataclass(frozen=True)
class PrecomputedRow:
    """The state of a row when its next token was computed, and the index of its logits."""

    index: int
    computed: int
    blocks: list[int]  # compared by identity: a row that loses its blocks gets another list

    def matches(self, row: Row) -> bool:
        """Whether the row still is in this state and scheduled for just this token."""
        return row.scheduled == 1 and row.computed == self.computed and row.blocks is self.blocks


class Lookahead:
    """`begin` launches the next step, `logits` hands out what it computed."""

    def __init__(self, graphs: DecodeGraphs, max_context: int) -> None:
        self._graphs = graphs
        self._max_context = max_context
        self._precomputed: dict[str, PrecomputedRow] = {}  # by row id
        self._logits = torch.empty(0)  # [precomputed rows, vocabulary]
        self.off = False  # each step waits for the one before it
        self.taken = self.wasted = 0  # precomputed rows: reused, and dropped

    def begin(self, rows: list[Row], tokens: torch.Tensor, reserve: Callable[[Row, int], bool]) -> None:
        """Launch the step after that of `rows`, which will have these tokens, int64 [rows] on the device.

        It computes the rows that have tokens left and for which `reserve(row, tokens)` can reserve the blocks
        of so many tokens. Nothing is launched while a row is in prefill, or if no recorded step serves them.
        """
        if self.off or not all(row.completes and not row.draft for row in rows):
            return
        going = [
            (i, row)
            for i, row in enumerate(rows)
            if row.remaining_output(self._max_context) > 1 and reserve(row, len(row.tokens) + 1)
        ]
        if not going:
            return
        continuing = [row for _, row in going]
        positions = [len(row.tokens) for row in continuing]
        if len(continuing) < len(rows):
            tokens = tokens[send([i for i, _ in going], tokens.device)]
        logits = self._graphs.replay_with(continuing, positions, tokens)
        if logits is not None:
            self._logits = logits
            self._precomputed = {
                row.id: PrecomputedRow(i, position, row.blocks)
                for i, (row, position) in enumerate(zip(continuing, positions, strict=True))
            }

    def logits(self, rows: list[Row], compute: Compute) -> torch.Tensor | None:
        """float32 logits [rows, vocabulary] of the step of `rows`; `compute` gives those of rows that were
        not precomputed.

        None: no row was. Valid until the next `begin`.
        """
        precomputed, logits = self._precomputed, self._logits
        matching = [row for row in rows if (before := precomputed.get(row.id)) and before.matches(row)]
        self.taken += len(matching)
        self.wasted += len(precomputed) - len(matching)
        self._precomputed, self._logits = {}, torch.empty(0)
        if not matching:
            return None
        indices = [precomputed[row.id].index for row in matching]
        if indices == list(range(len(indices))):
            logits = logits[: len(indices)]
        else:
            logits = logits[send(indices, logits.device)]
        if len(matching) == len(rows):
            return logits
        known = {row.id for row in matching}
        others = [row for row in rows if row.id not in known]
        # clone first: `compute` may replay the same recorded step, which writes to the same output
        both = torch.cat([logits.clone(), compute(others)])
        order = {row.id: i for i, row in enumerate([*matching, *(row for row in others if row.completes)])}
        return both[send([order[row.id] for row in rows if row.completes], both.device)]
