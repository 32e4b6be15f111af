"""What each tenant has waiting and running, and what it has been served: whose row is next.

Virtual Token Counter, arXiv 2401.00588. A tenant is charged the prompt tokens that were computed for it, once
each, and the tokens that it got, over its weight. The least served goes first. Counters never fall:

- A tenant that arrives, with nothing here, stands with the least served of those that wait or run, and if
  nobody does with the last one that left: its absence earns it nothing.
- One that runs and has nothing waiting asks for no more than it gets, so it falls behind the others by no
  more than CREDIT: it cannot save up turns and then shut the others out.
- One that left is remembered until the others have caught up with it, so leaving and coming back earns
  nothing either.

Places in the batch come first: a tenant that waits with no row running goes before all others, and one with
less than its part, by weight, before those with more, as long as it has not been served more than the least
by CREDIT. So the counters of tenants that always wait differ by no more than CREDIT and what their running
rows are charged, as long as one place each does not serve them unalike.
"""

from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from server.engine.scheduling.row import Row

CREDIT = 256.0  # tokens over weight


@dataclass(eq=False)
class TenantQueue:
    """One tenant's waiting rows, how many of its rows run, and what it has been served."""

    rows: OrderedDict[str, Row] = field(default_factory=OrderedDict)
    running: int = 0
    weight: float = 1.0
    served: float = 0.0  # tokens over weight

    @property
    def active(self) -> bool:
        return self.running > 0 or bool(self.rows)

    @property
    def held(self) -> int:
        """Rows, waiting or running."""
        return self.running + len(self.rows)


@dataclass(eq=False)
class Turn:
    """A tenant's rows that are in prefill, and after them those that wait."""

    queue: TenantQueue
    entitled: int  # places
    begun: deque[Row] = field(default_factory=deque)
    waiting: deque[Row] = field(default_factory=deque)

    def order(self, least: float) -> tuple[int, float]:
        """The lowest goes first: who has no row running, then who is due more places, then all others."""
        queue = self.queue
        due = queue.running < self.entitled and queue.served <= least + CREDIT
        return (0 if not queue.running else 1 if due else 2), queue.served


class Turns:
    """Whose prompts get tokens in one step, row by row; a tenant may be charged between two rows."""

    def __init__(self, turns: dict[str, Turn], least: float) -> None:
        self._turns = turns
        self._least = least  # that any tenant with a row waiting has been served

    def next(self) -> tuple[Row, bool] | None:
        """The next row, and whether it runs already."""
        while self._turns:
            tenant, turn = min(self._turns.items(), key=lambda item: item[1].order(self._least))
            if turn.begun:
                return turn.begun.popleft(), True
            if turn.waiting:
                return turn.waiting.popleft(), False
            del self._turns[tenant]
        return None

    def pass_by(self, row: Row) -> None:
        """No more newcomers of its tenant in this step."""
        self._turns[row.command.tenant].waiting.clear()

    def close(self) -> None:
        """No more newcomers of anybody."""
        for turn in self._turns.values():
            turn.waiting.clear()


def entitled(share: float, places: int) -> int:
    """Places in the batch that a tenant has a right to."""
    return max(1, int(places * share))


class FairQueue:
    """Memory is bounded by the tenants that are here, and those that left with more than their share."""

    def __init__(self) -> None:
        self.by_tenant: dict[str, TenantQueue] = {}
        self.waiting = 0
        self._floor = 0.0  # what the last tenant that left had been served

    def __len__(self) -> int:
        return self.waiting

    def __iter__(self) -> Iterator[Row]:
        return (row for queue in self.by_tenant.values() for row in queue.rows.values())

    def of(self, row: Row) -> TenantQueue:
        return self.by_tenant[row.command.tenant]

    def find(self, id_: str) -> Row | None:
        return next((queue.rows[id_] for queue in self.by_tenant.values() if id_ in queue.rows), None)

    def add(self, row: Row) -> None:
        """A row that arrives."""
        queue = self.by_tenant.setdefault(row.command.tenant, TenantQueue())
        queue.weight = row.command.weight
        if not queue.rows:
            others = [q.served for q in self.by_tenant.values() if q.active and q is not queue]
            if queue.running and others:
                queue.served = max(queue.served, min(others) - CREDIT)
            elif not queue.running:
                queue.served = max(queue.served, min(others, default=self._floor))
        queue.rows[row.id] = row
        self.waiting += 1

    def start(self, row: Row) -> None:
        """A row that waited runs."""
        queue = self.of(row)
        del queue.rows[row.id]
        self.waiting -= 1
        queue.running += 1

    def put_back(self, row: Row) -> None:
        """A row that ran waits again: it comes before its tenant's others."""
        queue = self.of(row)
        queue.running -= 1
        queue.rows[row.id] = row
        queue.rows.move_to_end(row.id, last=False)
        self.waiting += 1

    def drop(self, row: Row) -> None:
        """A row that waited, or ran, has ended."""
        queue = self.of(row)
        if queue.rows.pop(row.id, None) is not None:
            self.waiting -= 1
        else:
            queue.running -= 1
        if not queue.active:
            self._forget_idle(queue.served)

    def charge(self, row: Row, tokens: int) -> None:
        """Its tenant has been served so many tokens more."""
        self.of(row).served += tokens / row.command.weight

    def share(self) -> Callable[[TenantQueue], float]:
        """Of each tenant, its part of all by its weight among those that wait or run."""
        total = sum(queue.weight for queue in self.by_tenant.values() if queue.active)
        return lambda queue: queue.weight / total

    def turns(self, prefilling: Iterable[Row], places: int) -> Turns:
        share = self.share()
        begun: dict[str, deque[Row]] = {}
        for row in prefilling:
            begun.setdefault(row.command.tenant, deque()).append(row)
        turns = {
            tenant: Turn(
                queue,
                entitled(share(queue), places),
                begun.get(tenant, deque()),
                deque(queue.rows.values()),
            )
            for tenant, queue in self.by_tenant.items()
            if queue.rows or tenant in begun
        }
        waiting = (queue.served for queue in self.by_tenant.values() if queue.rows)
        return Turns(turns, min(waiting, default=0.0))

    def _forget_idle(self, left: float) -> None:
        """A tenant has left: forget those whose counters would be lifted anyhow when they came back."""
        active = [queue.served for queue in self.by_tenant.values() if queue.active]
        if not active:
            self._floor = left
        least = min(active, default=left)
        self.by_tenant = {t: q for t, q in self.by_tenant.items() if q.active or q.served > least}
