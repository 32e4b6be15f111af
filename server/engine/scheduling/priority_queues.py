"""The waiting rows of all priority classes, a FairQueue for each.

A class goes before the ones after it, for places, memory and tokens. So that none starves, a class that has
had rows waiting and none running for AGEING_SECONDS gives the row that arrived first to the class before it.
"""

from collections.abc import Iterator

from server.engine.scheduling.fair_queue import FairQueue, TenantQueue
from server.engine.scheduling.row import Row
from server.messages import PRIORITIES

AGEING_SECONDS = 30.0


class PriorityQueues:
    """Finds the FairQueue of a row, by its level: an index of `classes`, 0 the most urgent."""

    def __init__(self, largest_recompute: float, largest_step: float) -> None:
        """Costs that bound the gaps, see FairQueue."""
        self.classes = [FairQueue(largest_recompute, largest_step) for _ in PRIORITIES]
        self._served_at = [0.0 for _ in PRIORITIES]  # when rows of it ran last, or none waited

    def __len__(self) -> int:
        return sum(queues.waiting for queues in self.classes)

    def __iter__(self) -> Iterator[Row]:
        return (row for queues in self.classes for row in queues)

    def of(self, row: Row) -> FairQueue:
        return self.classes[row.level]

    def tenant_queue(self, row: Row) -> TenantQueue:
        return self.classes[row.level].tenant_queue(row)

    def find(self, id_: str) -> Row | None:
        return next((row for queues in self.classes if (row := queues.find(id_))), None)

    def tenant_queues(self) -> Iterator[tuple[str, TenantQueue]]:
        """Each tenant, as often as it has queues."""
        return (item for queues in self.classes for item in queues.by_tenant.items())

    def running_before(self, level: int) -> int:
        """Rows that run in more urgent classes."""
        return sum(queues.running for queues in self.classes[:level])

    @property
    def charged(self) -> float:
        """Cost that all tenants have been charged so far."""
        return sum(queues.charged for queues in self.classes)

    def relative_gap(self) -> float:
        """The largest gap of a class over its bound."""
        return max(queues.gap() / queues.max_gap for queues in self.classes)

    def age(self, now: float) -> None:
        """Move a row of each class that has starved for AGEING_SECONDS one class up."""
        for level, queues in enumerate(self.classes[1:], 1):
            if queues.running or not queues.waiting:
                self._served_at[level] = now
            elif now - self._served_at[level] > AGEING_SECONDS:
                self._served_at[level] = now
                self._raise(min(queues, key=lambda row: row.timing.arrived))

    def _raise(self, row: Row) -> None:
        self.of(row).remove(row)
        row.level -= 1
        self.of(row).add(row)
