"""Fair queue of one priority class: each tenant's waiting rows, and how much each tenant has been served.

Virtual Token Counter, arXiv 2401.00588. A tenant's counter rises by the cost (costs.py) of what its rows use,
divided by its weight. The tenant with the lowest counter goes first (prefill_order.py, preemption.py).

A tenant is backlogged while at least one of its rows could start if there were room: rows that wait for their
adapter, or for a sibling's prefill, are held and do not count. Counters change in two ways only:

- They rise by what is charged.
- The counter of a tenant that becomes backlogged is raised to the lowest of the backlogged tenants, so that
  absence earns nothing, and lowered to `max_gap` above it, so that what it used while nobody waited is no
  debt. If no tenant is backlogged, it is raised to that of the tenant that was so last.

So counters of backlogged tenants never differ by more than `max_gap`. docs/fairness.md has the proof.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from server.engine.scheduling import costs
from server.engine.scheduling.row import Row

CREDIT = 256.0  # cost over weight: a tenant may be so far ahead and still get its fair share of places


@dataclass(eq=False)
class TenantQueue:
    """One tenant's waiting rows, the number of its running rows, and its virtual counter."""

    rows: OrderedDict[str, Row] = field(default_factory=OrderedDict)
    prompt_tokens: int = 0  # of `rows`
    held: int = 0  # of `rows`, those that wait for an adapter or a sibling
    running: int = 0
    weight: float = 1.0
    virtual_counter: float = 0.0  # cost over weight

    @property
    def active(self) -> bool:
        return self.running > 0 or bool(self.rows)

    @property
    def backlogged(self) -> bool:
        """A waiting row could start if there were room."""
        return len(self.rows) > self.held

    @property
    def num_rows(self) -> int:
        """Rows, waiting or running."""
        return self.running + len(self.rows)


def fair_rows(share: float, max_seqs: int) -> int:
    """Running rows that a tenant is entitled to, at least one."""
    return max(1, int(max_seqs * share))


class FairQueue:
    """The queues of all tenants. Bounded: it forgets inactive tenants whose counters no longer matter."""

    def __init__(self, largest_recompute: float, largest_step: float) -> None:
        """The largest costs of a recompute and of a step (costs.py), which bound the gap."""
        self.by_tenant: dict[str, TenantQueue] = {}
        self.waiting = 0
        self.running = 0
        self.largest_recompute = largest_recompute
        self.largest_step = largest_step
        self.largest_load = 0.0  # of those charged so far
        self.charged = 0.0  # cost of all tenants so far
        self._last_backlogged = TenantQueue()  # when no tenant is

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
        self._queue(row, queue)

    def start(self, row: Row) -> None:
        """Count a waiting row as running."""
        queue = self.tenant_queue(row)
        self._unqueue(row, queue)
        queue.running += 1
        self.running += 1

    def requeue(self, row: Row) -> None:
        """Queue a preempted row again, before the other rows of its tenant."""
        queue = self.tenant_queue(row)
        queue.running -= 1
        self.running -= 1
        self._queue(row, queue)
        queue.rows.move_to_end(row.id, last=False)

    def remove(self, row: Row) -> None:
        """Remove a row that has ended, waiting or running."""
        queue = self.tenant_queue(row)
        if row.id in queue.rows:
            self._unqueue(row, queue)
        else:
            queue.running -= 1
            self.running -= 1
        if not queue.active:
            self._forget_idle()

    def hold(self, row: Row) -> None:
        """A waiting row cannot start yet, whatever room there is."""
        if not row.held:
            queue, row.held = self.tenant_queue(row), True
            queue.held += 1
            if not queue.backlogged:
                self._last_backlogged = queue

    def release(self, row: Row) -> None:
        """A held row could start again."""
        if row.held:
            queue = self.tenant_queue(row)
            self._enter_backlog(queue)
            queue.held -= 1
            row.held = False

    def charge(self, row: Row, cost: float) -> None:
        """Charge the row's tenant."""
        self.tenant_queue(row).virtual_counter += cost / row.command.weight
        self.charged += cost

    def charge_prompt(self, row: Row) -> None:
        """Charge the tenant for the row's scheduled prompt tokens; not for those that are computed again."""
        end = min(row.computed + row.scheduled, row.prompt_length)
        self.charge(row, costs.COMPUTED_TOKEN * max(0, end - max(row.computed, row.charged_tokens)))
        row.charged_tokens = max(row.charged_tokens, end)

    def charge_cached(self, row: Row) -> None:
        """Charge the tenant of a row that starts for the prompt tokens that it found in the prefix cache."""
        self.charge(row, costs.CACHED_TOKEN * row.cached_tokens)

    def charge_load(self, row: Row, nbytes: int) -> None:
        """Charge the row's tenant for loading so many bytes of adapters."""
        if nbytes:
            cost = costs.load_cost(nbytes)
            self.largest_load = max(self.largest_load, cost)
            self.charge(row, cost)

    def lowest_counter(self) -> float | None:
        """Of the backlogged tenants; None if there are none."""
        if not self.waiting:
            return None
        return min((q.virtual_counter for q in self.by_tenant.values() if q.backlogged), default=None)

    def fair_shares(self) -> Callable[[TenantQueue], float]:
        """A function from a tenant's queue to its share, by weight, among the active tenants."""
        total = sum(queue.weight for queue in self.by_tenant.values() if queue.active)
        return lambda queue: queue.weight / total

    @property
    def max_lead(self) -> float:
        """A backlogged tenant takes places from tenants that have been served so much more than itself."""
        return CREDIT + self.largest_recompute / self._lowest_weight()

    @property
    def max_gap(self) -> float:
        """The most by which counters of backlogged tenants differ; by the lowest weight of those here."""
        cost = self.largest_recompute + self.largest_step + self.largest_load
        return CREDIT + cost / self._lowest_weight()

    def over_served(self) -> set[str]:
        """Tenants of whose running rows a backlogged tenant may take any: see `max_lead`."""
        lowest = self.lowest_counter()
        if lowest is None:
            return set()
        most = lowest + self.max_lead
        return {t for t, q in self.by_tenant.items() if q.running and q.virtual_counter > most}

    def gap(self) -> float:
        """The difference of the highest and the lowest counter of backlogged tenants."""
        counters = [q.virtual_counter for q in self.by_tenant.values() if q.backlogged]
        return max(counters) - min(counters) if counters else 0.0

    def _lowest_weight(self) -> float:
        return min((q.weight for q in self.by_tenant.values() if q.active), default=1.0)

    def _queue(self, row: Row, queue: TenantQueue) -> None:
        self._enter_backlog(queue)
        queue.rows[row.id] = row
        queue.prompt_tokens += len(row.command.prompt)
        self.waiting += 1

    def _unqueue(self, row: Row, queue: TenantQueue) -> None:
        was_backlogged = queue.backlogged
        del queue.rows[row.id]
        queue.prompt_tokens -= len(row.command.prompt)
        self.waiting -= 1
        queue.held -= row.held
        row.held = False
        if was_backlogged and not queue.backlogged:
            self._last_backlogged = queue

    def _enter_backlog(self, queue: TenantQueue) -> None:
        """Before a row of the tenant could start: raise or lower its counter if none could until now."""
        if queue.backlogged:
            return
        lowest = self.lowest_counter()
        if lowest is None:
            queue.virtual_counter = max(queue.virtual_counter, self._last_backlogged.virtual_counter)
        else:
            highest = lowest + self.max_gap
            queue.virtual_counter = min(max(queue.virtual_counter, lowest), highest)

    def _forget_idle(self) -> None:
        """A tenant has left: forget the inactive ones whose counters would be raised on return."""
        lowest = self.lowest_counter()
        if lowest is None:
            lowest = self._last_backlogged.virtual_counter
        self.by_tenant = {t: q for t, q in self.by_tenant.items() if q.active or q.virtual_counter > lowest}
