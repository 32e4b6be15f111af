"""Whose row gives way when places or KV memory run out.

Each tenant that waits or runs is entitled to its part, by weight, of the places in the batch and of the KV
memory, and to one place at least. It may use more while nobody else waits. When another tenant's row needs a
place or memory that is not free:

- A tenant with no row running takes it from tenants that have more than they are entitled to, at once. They
  keep their entitlement, and at least one row, so they go on.
- If there is no such tenant, because tenants outnumber places or rows are large, it takes it from one that
  has been served as much as itself, from a row that has got as many tokens as its recompute costs: they take
  turns.
- A tenant with rows running, but less than its entitlement, takes a place from those that have more, unless
  it has been served more than they by CREDIT, the cost of the recompute included.

A row that gave way cannot take its place back: its tenant has its entitlement still, or must wait until the
other's row has had its turn.
"""

from collections import Counter
from collections.abc import Collection

from server.engine.scheduling.fair_queue import CREDIT, FairQueue, TenantQueue, entitled
from server.engine.scheduling.kv_blocks import BlockPool
from server.engine.scheduling.row import Row


class Victims:
    """Rows that give way, chosen one by one for a row of `taker`; nothing happens to them here."""

    def __init__(
        self, running: Collection[Row], queues: FairQueue, blocks: BlockPool, taker: TenantQueue, places: int
    ) -> None:
        self._running = running
        self._queues = queues
        self._blocks = blocks
        self._taker = taker
        self._places = places
        self._share = queues.share()
        self._rows: list[Row] = []  # of other tenants, in order of admission
        self._left: Counter[TenantQueue] = Counter()  # of those, by tenant
        self._memory: Counter[TenantQueue] = Counter()  # their blocks

    def find(self, *, place: bool, blocks: int) -> list[Row]:
        """Enough of them for a place, if one is needed, and so many blocks; [] if that is not to be had."""
        taker, found = self._taker, list[Row]()
        if taker.running and not (place and taker.running < self._entitled(taker)):
            return found
        self._rows = [row for row in self._running if self._queues.of(row) is not taker]
        for other in self._rows:
            self._left[self._queues.of(other)] += 1
            self._memory[self._queues.of(other)] += len(other.blocks)
        refs: Counter[int] = Counter()
        while (place and not found) or blocks > 0:
            row = self._next(place=place and not found)
            if row is None:
                return []
            found.append(row)
            self._rows.remove(row)
            queue = self._queues.of(row)
            self._left[queue] -= 1
            self._memory[queue] -= len(row.blocks)
            refs.update(row.blocks)
            blocks -= sum(refs[block] == self._blocks.refs[block] for block in row.blocks)
        return found

    def _next(self, *, place: bool) -> Row | None:
        """For a place, or else for memory."""
        taker = self._taker
        over = [row for row in self._rows if self._is_over(self._queues.of(row), place=place)]
        if taker.running:
            over = [row for row in over if place and self._is_due(row)]
        elif not over:
            over = [r for r in self._rows if r.recovered and self._queues.of(r).served >= taker.served]
        held = self._left if place else self._memory

        def preference(at: tuple[int, Row]) -> tuple[float, float, bool, int]:
            """Of who is the most over, a row that has recovered its last recompute, and then the latest."""
            i, row = at
            queue = self._queues.of(row)
            return held[queue] / queue.weight, queue.served, row.recovered, i

        _, row = max(enumerate(over), key=preference, default=(0, None))
        return row

    def _is_over(self, queue: TenantQueue, *, place: bool) -> bool:
        """It has more than it is entitled to, and keeps a row when it gives one."""
        if place:
            return self._left[queue] > self._entitled(queue)
        return self._left[queue] > 1 and self._memory[queue] > self._blocks.count * self._share(queue)

    def _entitled(self, queue: TenantQueue) -> int:
        return entitled(self._share(queue), self._places)

    def _is_due(self, row: Row) -> bool:
        """With what the recompute costs, the taker has not been served much more than the row's tenant."""
        cost = row.recompute_cost / self._taker.weight
        return self._taker.served + cost <= self._queues.of(row).served + CREDIT


def for_growth(running: Collection[Row], queues: FairQueue) -> Row:
    """Who gives way when a running row needs a block: the latest row of who holds the most for its weight."""
    memory: Counter[str] = Counter()
    for row in running:
        memory[row.command.tenant] += len(row.blocks)

    def held(row: Row) -> float:
        return memory[row.command.tenant] / queues.of(row).weight

    most = max(map(held, running))
    return next(row for row in reversed([*running]) if held(row) == most)
