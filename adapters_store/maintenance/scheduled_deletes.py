"""Write-ahead deletes: the unnamed objects of files, uploads and jobs (see unnamed_objects.py).

pp:doomed    zset    an object's key, or a prefix that ends in "/" -> when to remove it (Unix ms)
"""

import logging

from redis.asyncio import Redis

from adapters_store.maintenance.unnamed_objects import UnnamedObjects
from adapters_store.object_store.store import Objects
from server.errors import StoreError

SCHEDULED_KEY = "pp:doomed"
PAGE_SIZE = 100
log = logging.getLogger(__name__)


class ScheduledDeletes(UnnamedObjects):
    """All calls but `discard` raise StoreError."""

    def __init__(self, redis: Redis, objects: Objects) -> None:
        super().__init__(redis, SCHEDULED_KEY)
        self._objects = objects

    async def discard(self, key: str, again_in: float | None = None) -> None:
        """Remove the object at `key`, or all objects under it, now; and again in `again_in` seconds, when no
        writer can be late any more. If the store does not answer, a later sweep does it.
        """
        try:
            await self._remove(key)
            if again_in is not None:
                await self.add([key], again_in)
        except StoreError as error:
            log.warning("Objects without a record stay until the next sweep: %s", error)

    async def sweep(self) -> int:
        """Remove up to PAGE_SIZE keys and prefixes that are due, oldest first; how many there were."""
        due = await self.due(PAGE_SIZE)
        for key in due:
            await self._remove(key)
        return len(due)

    async def _remove(self, key: str) -> None:
        for found in await self._objects.list(key) if key.endswith("/") else [key]:
            await self._objects.delete(found)
        await self.forget([key])
