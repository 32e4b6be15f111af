"""The step after the one under way, begun on a GPU before the host has read the tokens it goes on from.

A step's tokens are on the device as soon as they are sampled: the next replay takes them from there and runs
while the host deals with these ones. Nothing is decided by it. The scheduler chooses the next step's rows as
ever; those of them that were computed ahead just as they stand have their logits already, the others are
computed then. A row that ended meanwhile was computed for nothing: what it wrote lies where nobody looks,
and the next owner of those blocks writes over it, behind it in the same stream.
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
    """As a row stood when its next token was computed, and where its logits are."""

    at: int  # among the logits
    computed: int
    blocks: list[int]  # the very list: a row that loses its blocks gets another

    def fits(self, row: Row) -> bool:
        return row.scheduled == 1 and row.computed == self.computed and row.blocks is self.blocks


class Lookahead:
    def __init__(self, graphs: DecodeGraphs, max_context: int) -> None:
        self._graphs = graphs
        self._max_context = max_context
        self._places: dict[str, PrecomputedRow] = {}  # by row's id
        self._logits = torch.empty(0)
        self.off = False  # each step waits for the one before it
        self.taken = self.wasted = 0  # rows

    def begin(self, rows: list[Row], tokens: torch.Tensor, room: Callable[[Row, int], bool]) -> None:
        """Start the step after that of `rows`, which are to have these tokens, int64 [rows] on the device.

        For those that have not reached their length, and that there is `room` for, in blocks for so many
        tokens. Not at all while a row is in prefill, or if there is no recorded step that serves them.
        """
        if self.off or not all(row.completes and not row.draft for row in rows):
            return
        going = [
            (i, row)
            for i, row in enumerate(rows)
            if row.remaining_output(self._max_context) > 1 and room(row, len(row.tokens) + 1)
        ]
        if not going:
            return
        own = [row for _, row in going]
        at = [len(row.tokens) for row in own]
        if len(own) < len(rows):
            tokens = tokens[send([i for i, _ in going], tokens.device)]
        logits = self._graphs.go_on(own, at, tokens)
        if logits is not None:
            self._logits = logits
            self._places = {
                row.id: PrecomputedRow(i, n, row.blocks)
                for i, (row, n) in enumerate(zip(own, at, strict=True))
            }

    def logits(self, rows: list[Row], compute: Compute) -> torch.Tensor | None:
        """Of the step of `rows`, as `compute` gives them for those that were not computed ahead.

        None: that is all of them. Good until the next step is begun.
        """
        places, logits = self._places, self._logits
        fitting = [row for row in rows if (place := places.get(row.id)) and place.fits(row)]
        self.taken += len(fitting)
        self.wasted += len(places) - len(fitting)
        self._places, self._logits = {}, torch.empty(0)
        if not fitting:
            return None
        at = [places[row.id].at for row in fitting]
        if at == list(range(len(at))):
            logits = logits[: len(at)]
        else:
            logits = logits[send(at, logits.device)]
        if len(fitting) == len(rows):
            return logits
        known = {row.id for row in fitting}
        others = [row for row in rows if row.id not in known]
        # a copy comes first: what is computed now may be the same recorded step, which has one place for both
        both = torch.cat([logits.clone(), compute(others)])
        order = {row.id: i for i, row in enumerate([*fitting, *(row for row in others if row.completes)])}
        return both[send([order[row.id] for row in rows if row.completes], both.device)]
