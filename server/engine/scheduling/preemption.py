"""Which running rows are preempted when the batch is full or KV blocks run out.

Each active tenant is entitled to its fair share, by weight, of the running rows (at least one row) and of the
KV blocks. It may use more while no other tenant waits. When the row of another tenant needs a place in the
batch, or blocks, that are not free:

- A tenant with no row running takes them at once from tenants that have more than their fair share. Those
  keep their fair share and at least one row, so they go on.
- If there are none, because there are more tenants than places or rows are large, it takes them from a tenant
  whose counter is at least its own, from a row that has decoded as many tokens as its recompute costs: the
  tenants take turns.
- A tenant with rows running, but fewer than its fair share, takes a place from tenants with more, unless its
  counter, with the cost of the recompute, is more than CREDIT above theirs.

A preempted row cannot take its place back: its tenant still has its fair share, or must wait until the other
row has decoded as much as its own recompute costs.
"""

from collections import Counter
from collections.abc import Collection

from server.engine.scheduling.fair_queue import CREDIT, FairQueue, TenantQueue, fair_rows
from server.engine.scheduling.kv_blocks import BlockPool
from server.engine.scheduling.row import Row


class VictimSelector:
    """Chooses the rows to preempt for one row of tenant `taker`. It changes none of them."""

    def __init__(
        self,
        running: Collection[Row],
        queues: FairQueue,
        blocks: BlockPool,
        taker: TenantQueue,
        max_seqs: int,
    ) -> None:
        self._running = running
        self._queues = queues
        self._blocks = blocks
        self._taker = taker
        self._max_seqs = max_seqs
        self._share = queues.fair_shares()
        self._candidates: list[Row] = []  # of other tenants, in order of admission
        self._num_rows: Counter[TenantQueue] = Counter()  # of the candidates, by tenant
        self._num_blocks: Counter[TenantQueue] = Counter()

    def find(self, *, needs_place: bool, num_blocks: int) -> list[Row]:
        """The rows to preempt for a place, if needed, and `num_blocks` blocks; [] if they do not suffice."""
        taker, victims = self._taker, list[Row]()
        if taker.running and not (needs_place and taker.running < self._fair_rows(taker)):
            return victims
        self._candidates = [row for row in self._running if self._queues.tenant_queue(row) is not taker]
        for row in self._candidates:
            self._num_rows[self._queues.tenant_queue(row)] += 1
            self._num_blocks[self._queues.tenant_queue(row)] += len(row.blocks)
        refs: Counter[int] = Counter()
        while (needs_place and not victims) or num_blocks > 0:
            victim = self._next(for_place=needs_place and not victims)
            if victim is None:
                return []
            victims.append(victim)
            self._candidates.remove(victim)
            queue = self._queues.tenant_queue(victim)
            self._num_rows[queue] -= 1
            self._num_blocks[queue] -= len(victim.blocks)
            refs.update(victim.blocks)
            num_blocks -= sum(refs[block] == self._blocks.refs[block] for block in victim.blocks)
        return victims

    def _next(self, *, for_place: bool) -> Row | None:
        """The next victim, for a place in the batch or else for blocks."""
        taker = self._taker
        rows = [
            row for row in self._candidates if self._is_over_share(self._queues.tenant_queue(row), for_place)
        ]
        if taker.running:
            rows = [row for row in rows if for_place and self._may_take_from(row)]
        elif not rows:
            rows = [
                row
                for row in self._candidates
                if row.recovered and self._counter(row) >= taker.virtual_counter
            ]
        usage = self._num_rows if for_place else self._num_blocks

        def preference(item: tuple[int, Row]) -> tuple[float, float, bool, int]:
            """Of the tenant with the highest usage, a row that has recovered, then the latest row."""
            i, row = item
            queue = self._queues.tenant_queue(row)
            return usage[queue] / queue.weight, queue.virtual_counter, row.recovered, i

        _, victim = max(enumerate(rows), key=preference, default=(0, None))
        return victim

    def _is_over_share(self, queue: TenantQueue, for_place: bool) -> bool:
        """The tenant has more than its fair share, and keeps at least one row when it loses one."""
        if for_place:
            return self._num_rows[queue] > self._fair_rows(queue)
        share = self._blocks.count * self._share(queue)
        return self._num_rows[queue] > 1 and self._num_blocks[queue] > share

    def _fair_rows(self, queue: TenantQueue) -> int:
        return fair_rows(self._share(queue), self._max_seqs)

    def _counter(self, row: Row) -> float:
        return self._queues.tenant_queue(row).virtual_counter

    def _may_take_from(self, row: Row) -> bool:
        """The taker's counter, with the recompute, is at most CREDIT above that of the row's tenant."""
        cost = row.recompute_cost / self._taker.weight
        return self._taker.virtual_counter + cost <= self._counter(row) + CREDIT


def victim_for_growth(running: Collection[Row], queues: FairQueue) -> Row:
    """The row to preempt when a running row needs a block: the latest of the tenant with most blocks."""
    blocks: Counter[str] = Counter()
    for row in running:
        blocks[row.command.tenant] += len(row.blocks)

    def usage(row: Row) -> float:
        return blocks[row.command.tenant] / queues.tenant_queue(row).weight

    highest = max(map(usage, running))
    return next(row for row in reversed([*running]) if usage(row) == highest)
