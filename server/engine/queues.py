"""Rows that wait, and whose turn it is: the tenant's that has been served least for its weight.

Virtual Token Counter, arXiv 2401.00588. What a tenant has been served is counted in tokens over weight.
"""

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field

from server.engine.row import Row


@dataclass
class Queue:
    """One tenant's waiting rows, and what it has been served."""

    rows: OrderedDict[str, Row] = field(default_factory=OrderedDict)
    served: float = 0.0


class Queues:
    """Of a tenant with nothing waiting or running no trace stays: memory is bounded."""

    def __init__(self) -> None:
        self.by_tenant: dict[str, Queue] = {}

    def __len__(self) -> int:
        return sum(len(queue.rows) for queue in self.by_tenant.values())

    def __iter__(self) -> Iterator[Row]:
        return (row for queue in self.by_tenant.values() for row in queue.rows.values())

    def find(self, id_: str) -> Row | None:
        return next((queue.rows[id_] for queue in self.by_tenant.values() if id_ in queue.rows), None)

    def add(self, row: Row) -> None:
        queue = self.by_tenant.get(row.command.tenant)
        if queue is None or not queue.rows:
            # A tenant that was idle must not cash in on its absence.
            least = min((q.served for q in self.by_tenant.values() if q.rows), default=0.0)
            queue = self.by_tenant.setdefault(row.command.tenant, Queue())
            queue.served = max(queue.served, least)
        queue.rows[row.id] = row

    def put_back(self, row: Row) -> None:
        """A row that was preempted: it comes before its tenant's others."""
        queue = self.by_tenant.setdefault(row.command.tenant, Queue())
        queue.rows[row.id] = row
        queue.rows.move_to_end(row.id, last=False)

    def remove(self, row: Row) -> None:
        if queue := self.by_tenant.get(row.command.tenant):
            queue.rows.pop(row.id, None)

    def charge(self, row: Row, tokens: int) -> None:
        """Its tenant has been served so many tokens more."""
        self.by_tenant[row.command.tenant].served += tokens / row.command.weight

    def candidates(self) -> Iterator[Row]:
        """The least-served tenant's oldest first; a tenant may be charged meanwhile."""
        left = [(queue, iter(list(queue.rows.values()))) for queue in self.by_tenant.values() if queue.rows]
        while left:
            chosen = min(left, key=lambda pair: pair[0].served)
            row = next(chosen[1], None)
            if row is None:
                left.remove(chosen)
            else:
                yield row

    def forget_idle(self, busy: set[str]) -> None:
        """Tenants with nothing waiting, but for those that are `busy`."""
        for tenant in [t for t, queue in self.by_tenant.items() if not queue.rows and t not in busy]:
            del self.by_tenant[tenant]
