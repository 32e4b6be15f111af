"""Fair queue: each tenant's waiting rows, and whose prompt is served next.

Virtual Token Counter, arXiv 2401.00588. A tenant's counter rises by the prompt tokens that are computed for
it, each charged once, and by its output tokens, divided by its weight. The tenant with the lowest counter
goes first. Counters never fall:

- The counter of a tenant that arrives, without rows in the engine, is raised to the lowest one of the active
  tenants, or, if there are none, to that of the last tenant that left: absence earns nothing.
- A tenant with rows running and none waiting asks for no more than it gets, so its counter falls behind the
  others'. When a row of it arrives, its counter is raised to CREDIT below the lowest of the others: it cannot
  save up credit and then shut the others out.
- The counter of a tenant that left is kept until the others have caught up with it, so leaving and coming
  back earns nothing either.

Rows that run count before counters: a waiting tenant with no row running goes before all others. One with
fewer rows running than its fair share, by weight, goes before those with more, as long as its counter is no
more than CREDIT above the lowest. So counters of tenants that always have rows waiting differ by no more than
CREDIT and what their running rows are charged, unless the one row that each may run serves them unequally.
"""

from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from server.engine.scheduling.row import Row

CREDIT = 256.0  # tokens over weight


@dataclass(eq=False)
class TenantQueue:
    """One tenant's waiting rows, the number of its running rows, and its virtual counter."""

    rows: OrderedDict[str, Row] = field(default_factory=OrderedDict)
    running: int = 0
    weight: float = 1.0
    virtual_counter: float = 0.0  # tokens over weight

    @property
    def active(self) -> bool:
        return self.running > 0 or bool(self.rows)

    @property
    def num_rows(self) -> int:
        """Rows, waiting or running."""
        return self.running + len(self.rows)


@dataclass(eq=False)
class TenantPrompts:
    """A tenant's rows whose prompts may get tokens in one step: those in prefill, then those that wait."""

    queue: TenantQueue
    fair_rows: int
    prefilling: deque[Row] = field(default_factory=deque)
    waiting: deque[Row] = field(default_factory=deque)

    def priority(self, lowest_counter: float) -> tuple[int, float]:
        """Sort key, lowest first: tenants with no row running, those below their fair rows, all others."""
        queue = self.queue
        below = queue.running < self.fair_rows and queue.virtual_counter <= lowest_counter + CREDIT
        return (0 if not queue.running else 1 if below else 2), queue.virtual_counter


class PrefillOrder:
    """The order in which prompts get tokens in one step. Tenants may be charged between calls of `next`."""

    def __init__(self, tenants: dict[str, TenantPrompts], lowest_counter: float) -> None:
        """`lowest_counter` is that of the tenants with rows waiting."""
        self._tenants = tenants
        self._lowest_counter = lowest_counter

    def next(self) -> tuple[Row, bool] | None:
        """The next row, and whether it is running already."""
        while self._tenants:
            name, tenant = min(self._tenants.items(), key=lambda item: item[1].priority(self._lowest_counter))
            if tenant.prefilling:
                return tenant.prefilling.popleft(), True
            if tenant.waiting:
                return tenant.waiting.popleft(), False
            del self._tenants[name]
        return None

    def skip_tenant(self, row: Row) -> None:
        """Start no more waiting rows of the row's tenant in this step."""
        self._tenants[row.command.tenant].waiting.clear()

    def skip_waiting(self) -> None:
        """Start no more waiting rows of any tenant in this step."""
        for tenant in self._tenants.values():
            tenant.waiting.clear()


def fair_rows(share: float, max_seqs: int) -> int:
    """Running rows that a tenant is entitled to, at least one."""
    return max(1, int(max_seqs * share))


class FairQueue:
    """The queues of all tenants. Bounded: it forgets inactive tenants whose counters no longer matter."""

    def __init__(self) -> None:
        self.by_tenant: dict[str, TenantQueue] = {}
        self.waiting = 0
        self._last_left_counter = 0.0  # of the tenant that left last, when no other was active

    def __len__(self) -> int:
        return self.waiting

    def __iter__(self) -> Iterator[Row]:
        return (row for queue in self.by_tenant.values() for row in queue.rows.values())

    def tenant_queue(self, row: Row) -> TenantQueue:
        return self.by_tenant[row.command.tenant]

    def find(self, id_: str) -> Row | None:
        return next((queue.rows[id_] for queue in self.by_tenant.values() if id_ in queue.rows), None)

    def add(self, row: Row) -> None:
        """Queue a row that arrives."""
        queue = self.by_tenant.setdefault(row.command.tenant, TenantQueue())
        queue.weight = row.command.weight
        if not queue.rows:
            others = [q.virtual_counter for q in self.by_tenant.values() if q.active and q is not queue]
            if queue.running and others:
                queue.virtual_counter = max(queue.virtual_counter, min(others) - CREDIT)
            elif not queue.running:
                queue.virtual_counter = max(
                    queue.virtual_counter, min(others, default=self._last_left_counter)
                )
        queue.rows[row.id] = row
        self.waiting += 1

    def start(self, row: Row) -> None:
        """Count a waiting row as running."""
        queue = self.tenant_queue(row)
        del queue.rows[row.id]
        self.waiting -= 1
        queue.running += 1

    def requeue(self, row: Row) -> None:
        """Queue a preempted row again, before the other rows of its tenant."""
        queue = self.tenant_queue(row)
        queue.running -= 1
        queue.rows[row.id] = row
        queue.rows.move_to_end(row.id, last=False)
        self.waiting += 1

    def remove(self, row: Row) -> None:
        """Remove a row that has ended, waiting or running."""
        queue = self.tenant_queue(row)
        if queue.rows.pop(row.id, None) is not None:
            self.waiting -= 1
        else:
            queue.running -= 1
        if not queue.active:
            self._forget_idle(queue.virtual_counter)

    def charge(self, row: Row, tokens: int) -> None:
        """Charge the row's tenant for so many tokens."""
        self.tenant_queue(row).virtual_counter += tokens / row.command.weight

    def fair_shares(self) -> Callable[[TenantQueue], float]:
        """A function from a tenant's queue to its share, by weight, among the active tenants."""
        total = sum(queue.weight for queue in self.by_tenant.values() if queue.active)
        return lambda queue: queue.weight / total

    def prefill_order(self, prefilling: Iterable[Row], max_seqs: int) -> PrefillOrder:
        """The order of prompts in this step; `prefilling` are the running rows in prefill."""
        share = self.fair_shares()
        by_tenant: dict[str, deque[Row]] = {}
        for row in prefilling:
            by_tenant.setdefault(row.command.tenant, deque()).append(row)
        tenants = {
            tenant: TenantPrompts(
                queue,
                fair_rows(share(queue), max_seqs),
                by_tenant.get(tenant, deque()),
                deque(queue.rows.values()),
            )
            for tenant, queue in self.by_tenant.items()
            if queue.rows or tenant in by_tenant
        }
        waiting = (queue.virtual_counter for queue in self.by_tenant.values() if queue.rows)
        return PrefillOrder(tenants, min(waiting, default=0.0))

    def _forget_idle(self, counter: float) -> None:
        """A tenant with this counter has left: forget the inactive ones that would return with the lowest."""
        active = [queue.virtual_counter for queue in self.by_tenant.values() if queue.active]
        if not active:
            self._last_left_counter = counter
        lowest = min(active, default=counter)
        self.by_tenant = {t: q for t, q in self.by_tenant.items() if q.active or q.virtual_counter > lowest}
