"""Which running rows are preempted when the batch is full, or KV blocks or adapter slots run out.

Each active tenant is entitled to its fair share, by weight, of its class's places (at least one) and of the
KV blocks. It may use more while no other tenant waits. A waiting row that needs a place in the batch, or
blocks, that are not free takes them from these rows, in this order:

- Rows of less urgent classes.
- Rows of tenants that have more than their fair share, if its own tenant is due (prefill_order.py): with no
  row running, or with less than its fair share and a counter that, with the cost of the recompute, is at most
  CREDIT above theirs. Those tenants keep their fair share and at least one row.
- Rows of tenants that have been served more: whose counter is more than CREDIT and the cost of the recompute
  above its own. This is what bounds the gap (docs/fairness.md).
- If its tenant has no row running, because there are more tenants than places or rows are large: rows of
  tenants whose counter is at least its own, which have decoded as many tokens as their recompute costs. The
  tenants take turns.

A preempted row cannot take its place back at once: the other must have used as much as that costs first.
"""

from collections import Counter
from collections.abc import Collection, Mapping
from math import inf

from server.engine.scheduling.fair_queue import CREDIT, FairQueue, TenantQueue, fair_rows
from server.engine.scheduling.kv_blocks import BlockPool
from server.engine.scheduling.priority_queues import PriorityQueues
from server.engine.scheduling.row import Row


class VictimSelector:
    """Chooses rows to preempt, and changes none of them. After any start, end or preemption call `reset`."""

    def __init__(
        self, running: Mapping[str, Row], queues: PriorityQueues, blocks: BlockPool, max_seqs: int
    ) -> None:
        self._running = running
        self._queues = queues
        self._blocks = blocks
        self._max_seqs = max_seqs
        self._num_rows: Counter[TenantQueue] = Counter()  # of candidates
        self._num_blocks: Counter[TenantQueue] = Counter()
        self.reset()

    def reset(self) -> None:
        """Forget what was computed for an earlier batch."""
        self._last_level = max(
            (i for i, queues in enumerate(self._queues.classes) if queues.running), default=0
        )
        self._recovered: float | None = None
        self._by_class: dict[int, _ClassShares] = {}

    def may_take(self, level: int, taker: TenantQueue) -> bool:
        """False: there is certainly no victim for a row of `taker`, which is of that class."""
        if level != self._last_level:
            return level < self._last_level
        shares = self._shares(level)
        return (
            (shares.any_over and shares.is_due(taker))
            or taker.virtual_counter + CREDIT < shares.highest
            or (not taker.running and taker.virtual_counter <= self._highest_recovered())
        )

    def _highest_recovered(self) -> float:
        """The highest counter of a tenant with a row that has decoded enough to lose its place."""
        if self._recovered is None:
            counters = (
                self._queues.tenant_queue(r).virtual_counter for r in self._running.values() if r.recovered
            )
            self._recovered = max(counters, default=-inf)
        return self._recovered

    def find(self, level: int, taker: TenantQueue, *, needs_place: bool, num_blocks: int) -> list[Row]:
        """The rows to preempt for a place, if needed, and `num_blocks` blocks; [] if they do not suffice."""
        victims: list[Row] = []
        pairs = ((row, self._queues.tenant_queue(row)) for row in self._running.values())
        candidates = [(row, queue) for row, queue in pairs if queue is not taker]
        self._num_rows, self._num_blocks = Counter(), Counter()
        for row, queue in candidates:
            self._num_rows[queue] += 1
            self._num_blocks[queue] += len(row.blocks)
        refs: Counter[int] = Counter()
        while (needs_place and not victims) or num_blocks > 0:
            chosen = self._next(level, taker, candidates, for_place=needs_place and not victims)
            if chosen is None:
                return []
            candidates.remove(chosen)
            row, queue = chosen
            victims.append(row)
            self._num_rows[queue] -= 1
            self._num_blocks[queue] -= len(row.blocks)
            refs.update(row.blocks)
            num_blocks -= sum(refs[block] == self._blocks.refs[block] for block in row.blocks)
        return victims

    def find_slot(self, level: int, taker: TenantQueue) -> list[Row]:
        """The rows to preempt so that no row uses some slot: the fewest; [] if there is none."""
        pairs = [(row, self._queues.tenant_queue(row)) for row in self._running.values()]
        self._num_rows = Counter(queue for _, queue in pairs)
        users: dict[int, list[Row]] = {}
        for row, _ in pairs:
            for slot in row.slots:
                users.setdefault(slot, []).append(row)
        kept = {
            slot
            for row, queue in pairs
            if queue is taker or not self._rank(level, taker, row, queue, for_place=True)
            for slot in row.slots
        }
        # of one class, a tenant that has more than its share loses one row at a time
        rows = [
            rows
            for slot, rows in users.items()
            if slot not in kept and (len(rows) == 1 or all(row.level > level for row in rows))
        ]
        return min(rows, key=len, default=[])

    def _next(
        self, level: int, taker: TenantQueue, candidates: list[tuple[Row, TenantQueue]], *, for_place: bool
    ) -> tuple[Row, TenantQueue] | None:
        """The next victim, for a place in the batch or else for blocks."""
        usage = self._num_rows if for_place else self._num_blocks
        ranked = [
            (rank, usage[queue] / queue.weight, queue.virtual_counter, row.recovered, i)
            for i, (row, queue) in enumerate(candidates)
            if (rank := self._rank(level, taker, row, queue, for_place=for_place))
        ]
        # of the tenant with the highest usage, a row that has recovered, then the latest row
        return candidates[max(ranked)[-1]] if ranked else None

    def _rank(self, level: int, taker: TenantQueue, row: Row, queue: TenantQueue, *, for_place: bool) -> int:
        """How readily this row makes way for one of `taker`; 0: it does not."""
        if row.level != level:
            return 3 + row.level if row.level > level else 0
        if self._is_over_share(level, queue, for_place) and self._takes_share(
            level, taker, row, queue, for_place
        ):
            return 3
        ahead = queue.virtual_counter - taker.virtual_counter
        if ahead > CREDIT + row.recompute_cost / taker.weight:
            return 2
        return 1 if not taker.running and row.recovered and ahead >= 0 else 0

    def _takes_share(
        self, level: int, taker: TenantQueue, row: Row, queue: TenantQueue, for_place: bool
    ) -> bool:
        """`taker` is due, and may take what that row's tenant has beyond its fair share."""
        if not self._shares(level).is_due(taker):
            return False
        if (
            not taker.running or not queue.backlogged
        ):  # the counter of a tenant without backlog has fallen behind
            return for_place or not taker.running
        cost = row.recompute_cost / taker.weight
        return for_place and taker.virtual_counter + cost <= queue.virtual_counter + CREDIT

    def _is_over_share(self, level: int, queue: TenantQueue, for_place: bool) -> bool:
        """The tenant has more than its fair share, and keeps at least one row when it loses one."""
        shares = self._shares(level)
        if for_place:
            return self._num_rows[queue] > shares.rows(queue)
        return self._num_rows[queue] > 1 and self._num_blocks[queue] > self._blocks.count * shares.share(
            queue
        )

    def _shares(self, level: int) -> "_ClassShares":
        if level not in self._by_class:
            places = self._max_seqs - self._queues.running_before(level)
            self._by_class[level] = _ClassShares(self._queues.classes[level], places)
        return self._by_class[level]


class _ClassShares:
    """What the tenants of one class are entitled to, and how much the most served one was served."""

    def __init__(self, queues: FairQueue, places: int) -> None:
        self.share = queues.fair_shares()
        self._places = places
        self._lowest = queues.lowest_counter() or 0.0
        running = [queue for queue in queues.by_tenant.values() if queue.running]
        self.any_over = any(queue.running > self.rows(queue) for queue in running)
        self.highest = max((queue.virtual_counter for queue in running), default=-inf)

    def rows(self, queue: TenantQueue) -> int:
        return fair_rows(self.share(queue), self._places)

    def is_due(self, queue: TenantQueue) -> bool:
        return queue.running < self.rows(queue) and queue.virtual_counter <= self._lowest + CREDIT


def victim_for_growth(running: Collection[Row], queues: PriorityQueues) -> Row:
    """The row to preempt when a running row needs a block: of the least urgent class, and there the latest
    of the tenant with most blocks.
    """
    level = max(row.level for row in running)
    rows = [row for row in running if row.level == level]
    blocks: Counter[str] = Counter()
    for row in rows:
        blocks[row.command.tenant] += len(row.blocks)

    def usage(row: Row) -> float:
        return blocks[row.command.tenant] / queues.tenant_queue(row).weight

    highest = max(map(usage, rows))
    return next(row for row in reversed(rows) if usage(row) == highest)
