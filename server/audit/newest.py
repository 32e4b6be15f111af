"""The entries of several tenants as one sequence, newest first, read from Valkey as they are needed."""

import heapq
from collections import deque
from collections.abc import AsyncIterator, Sequence

from server.audit.audit_log import AuditLog, Span
from server.audit.entry import Position, Recorded

READ_AT_ONCE = 2000  # entries in memory, roughly, whatever the number of tenants
FEWEST = 5  # of one tenant in a call
TENANTS_AT_ONCE = 200  # in a call


async def newest_first(
    log: AuditLog, tenants: Sequence[str], span: Span, after: Position | None = None
) -> AsyncIterator[Recorded]:
    """Those in `span` that come after the position `after`. Raises StoreError."""
    count = max(FEWEST, READ_AT_ONCE // max(1, len(tenants)))
    read: dict[str, deque[Recorded]] = {}
    for start in range(0, len(tenants), TENANTS_AT_ONCE):
        some = tenants[start : start + TENANTS_AT_ONCE]
        pages = await log.read([(tenant, after) for tenant in some], span, count)
        read |= {tenant: deque(page) for tenant, page in zip(some, pages, strict=True) if page}
    heap = [entries[0].position.order for entries in read.values()]
    heapq.heapify(heap)
    while heap:
        tenant = heap[0][2]
        entries = read[tenant]
        recorded = entries.popleft()
        if not entries:
            [page] = await log.read([(tenant, recorded.position)], span, count)
            entries.extend(page)
        if entries:
            heapq.heapreplace(heap, entries[0].position.order)
        else:
            heapq.heappop(heap)
        yield recorded
