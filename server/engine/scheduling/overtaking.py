"""How far rows that lack memory may be overtaken by the rows after them."""

from collections import Counter

from server.adapters.cache.device_cache import AdapterCache
from server.engine.scheduling.fair_queue import TenantQueue
from server.engine.scheduling.prefill_order import PrefillOrder
from server.engine.scheduling.row import Row

MAX_OVERTAKEN_STEPS = 32  # steps in which a row may lack memory before later rows stop overtaking it
MAX_ROWS_WITHOUT_MEMORY = 8  # in one step; after so many no other waiting row is tried


class Overtaking:
    """The limits in one step of one priority class."""

    def __init__(self, cache: AdapterCache) -> None:
        self._cache = cache
        self._blocked: Counter[str] = Counter()  # by tenant if only its own rows can free a slot, else as ""

    def limit(self, row: Row, queue: TenantQueue, order: PrefillOrder, *, slot: bool) -> None:
        """A row could not start without blocks, or a slot (`slot`): limit which rows may start before it."""
        row.steps_without_memory += 1
        overtaken, blocked = row.steps_without_memory > MAX_OVERTAKEN_STEPS, self._blocked
        if slot and any(self._cache.waits_for_own_rows(use.adapter) for use in row.uses):
            # a row that was overtaken too long stops its tenant's other rows at once
            blocked[row.command.tenant] += MAX_ROWS_WITHOUT_MEMORY if overtaken else 1
            if blocked[row.command.tenant] >= MAX_ROWS_WITHOUT_MEMORY:
                order.skip_tenant(queue)
            return
        blocked[""] += 1
        if (overtaken and not queue.running) or blocked[""] >= MAX_ROWS_WITHOUT_MEMORY:
            order.skip_waiting()  # if overtaken, the memory that is freed next is this row's
        elif overtaken:
            order.skip_tenant(queue)
