"""Objects that are to be removed, and when: what a crash leaves behind is on this list before it exists.

    pp:doomed    zset    an object's key, or a prefix with "/" at its end, by when to remove it (ms)

Whoever writes an object that nothing names yet dooms it first; the script that gives it a name spares it.
Times are Valkey's own.
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
        self._doom = redis.register_script(SCHEDULE)

    async def add(self, key: str, seconds: float) -> None:
        """Remove `key` in `seconds`; the last word counts."""
        with store_errors():
            await self._doom(keys=[SCHEDULED_KEY], args=[key, seconds])

    async def remove(self, key: str) -> None:
        """Remove what lies at `key`, or under it, now."""
        for found in await self._objects.list(key) if key.endswith("/") else [key]:
            await self._objects.delete(found)
        with store_errors():
            await self._redis.zrem(SCHEDULED_KEY, key)

    async def sweep(self) -> int:
        """Remove what is due, the oldest first; how many keys and prefixes that were."""
        with store_errors():
            seconds, _ = await self._redis.time()
            due: Any = await self._redis.zrange(
                SCHEDULED_KEY, 0, int(seconds) * 1000, byscore=True, offset=0, num=PAGE_SIZE
            )
        for key in due:
            await self.remove(key.decode())
        return len(due)
