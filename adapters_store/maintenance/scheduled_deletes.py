"""Write-ahead deletes: an object is scheduled for removal before it is written.

    pp:doomed    zset    an object's key, or a prefix that ends in "/" -> when to remove it (Unix ms)

A writer schedules the delete first; the script that commits a record of the object takes it off the list. So
an object whose writer crashed in between is removed when its time has come. Times are Valkey's own.
"""

import logging
from typing import Any

from redis.asyncio import Redis

from adapters_store.object_store.store import Objects
from adapters_store.valkey import store_errors

SCHEDULED_KEY = "pp:doomed"
PAGE_SIZE = 100
log = logging.getLogger(__name__)

SCHEDULE = """
local time = redis.call('TIME')
redis.call('ZADD', KEYS[1], string.format('%.0f', time[1] * 1000 + ARGV[2] * 1000), ARGV[1])
"""


class ScheduledDeletes:
    """All calls raise StoreError."""

    def __init__(self, redis: Redis, objects: Objects) -> None:
        self._redis = redis
        self._objects = objects
        self._schedule = redis.register_script(SCHEDULE)

    async def add(self, key: str, seconds: float) -> None:
        """Remove `key` in `seconds` from now; replaces an earlier time."""
        with store_errors():
            await self._schedule(keys=[SCHEDULED_KEY], args=[key, seconds])

    async def remove(self, key: str) -> None:
        """Remove the object at `key`, or all objects under it, now."""
        for found in await self._objects.list(key) if key.endswith("/") else [key]:
            await self._objects.delete(found)
        with store_errors():
            await self._redis.zrem(SCHEDULED_KEY, key)

    async def sweep(self) -> int:
        """Remove up to PAGE_SIZE keys and prefixes that are due, oldest first; how many there were."""
        with store_errors():
            seconds, _ = await self._redis.time()
            due: Any = await self._redis.zrange(
                SCHEDULED_KEY, 0, int(seconds) * 1000, byscore=True, offset=0, num=PAGE_SIZE
            )
        for key in due:
            await self.remove(key.decode())
        return len(due)
