"""The order in which the prompts of one priority class get tokens in a step.

The tenant with the lowest counter goes first, with one exception: a tenant that has less than its fair share
of the places, and a counter at most CREDIT above the lowest, is due. Tenants that are due go before all
others, those with no row running first. So first tokens come soon, and CREDIT bounds what that may cost.
"""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from heapq import heapify, heappop, heapreplace

from server.engine.scheduling.fair_queue import CREDIT, FairQueue, TenantQueue, fair_rows
from server.engine.scheduling.row import Row

NOT_DUE = 2


@dataclass(eq=False)
class TenantPrompts:
    """A tenant's rows whose prompts may get tokens in one step: those in prefill, then those that wait."""

    queue: TenantQueue
    fair_rows: int
    prefilling: deque[Row] = field(default_factory=deque)
    waiting: deque[Row] = field(default_factory=deque)

    def key(self, lowest_counter: float) -> tuple[int, float]:
        """Lowest first: tenants that are due with no row running, those that are due, all others."""
        queue = self.queue
        due = queue.running < self.fair_rows and queue.virtual_counter <= lowest_counter + CREDIT
        return (0 if due and not queue.running else 1 if due else NOT_DUE), queue.virtual_counter


class PrefillOrder:
    """Yields rows. Tenants may be charged between calls of `next`, and rows started."""

    def __init__(self, tenants: Iterable[TenantPrompts], lowest_counter: float) -> None:
        """`lowest_counter`: of the backlogged tenants."""
        self._lowest_counter = lowest_counter
        self._heap = [(*tenant.key(lowest_counter), i, tenant) for i, tenant in enumerate(tenants)]
        heapify(self._heap)
        self.stopped = False  # by skip_waiting
        self._refused: set[int] = set()  # of 0, 1 and NOT_DUE: tenants like these find no place in this step
        self._by_queue = {tenant.queue: tenant for *_, tenant in self._heap}

    def next(self) -> tuple[Row, bool] | None:
        """The next row, and whether it is running already."""
        while self._heap:
            *key, i, tenant = self._heap[0]
            now = tenant.key(self._lowest_counter)
            if now > tuple(key):  # it has been charged since
                heapreplace(self._heap, (*now, i, tenant))
            elif tenant.prefilling:
                return tenant.prefilling.popleft(), True
            elif tenant.waiting and now[0] not in self._refused:
                return tenant.waiting.popleft(), False
            else:
                heappop(self._heap)
        return None

    def refuse(self, queue: TenantQueue) -> None:
        """This tenant found no place. Nor would those after it that are due as it is, or not due at all."""
        tenant = self._by_queue[queue]
        self._refused |= {tenant.key(self._lowest_counter)[0], NOT_DUE}
        tenant.waiting.clear()

    def skip_tenant(self, queue: TenantQueue) -> None:
        """Start no more waiting rows of this tenant in this step."""
        self._by_queue[queue].waiting.clear()

    def skip_waiting(self) -> None:
        """Start no more waiting rows of any tenant in this step."""
        self.stopped = True
        for tenant in self._by_queue.values():
            tenant.waiting.clear()


def prefill_order(queues: FairQueue, prefilling: Iterable[Row], places: int) -> PrefillOrder:
    """The order in this step; `prefilling` are the class's running rows in prefill, `places` all that the
    class may take.
    """
    share = queues.fair_shares()
    by_tenant: dict[str, deque[Row]] = {}
    for row in prefilling:
        by_tenant.setdefault(row.command.tenant, deque()).append(row)
    tenants = [
        TenantPrompts(
            queue,
            fair_rows(share(queue), places),
            by_tenant.get(tenant, deque()),
            deque(queue.rows.values()),
        )
        for tenant, queue in queues.by_tenant.items()
        if queue.rows or tenant in by_tenant
    ]
    lowest = queues.lowest_counter()
    return PrefillOrder(tenants, 0.0 if lowest is None else lowest)
