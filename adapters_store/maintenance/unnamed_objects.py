"""Objects that no record names yet, each with a time from which it may be removed. One protocol for all:

1. A writer lists the object's key before it writes the first byte.
2. The script that commits a record of the object takes the key off the list.
3. A writer that gives up discards the object.
4. A sweep removes objects that are due: their writers have died.

There are two lists, because records are of two kinds. Files, parts and jobs have theirs in Valkey, so what is
due has none (scheduled_deletes.py). An adapter's is the manifest, which is in the object store before the
script of step 2 runs; so a blob that is due may have one (blob_leases.py, collector.py).
"""

from typing import Any

from redis.asyncio import Redis

from adapters_store.valkey import store_errors

PAGE_SIZE = 500  # keys of one command

ADD = """
local time = redis.call('TIME')
local due = string.format('%.0f', time[1] * 1000 + ARGV[1] * 1000)
for i = 2, #ARGV do redis.call('ZADD', KEYS[1], due, ARGV[i]) end
"""


class UnnamedObjects:
    """A list of them: the sorted set `list_key`, object key -> when it is due (Unix ms, Valkey's clock).

    All calls raise StoreError when Valkey does not answer.
    """

    def __init__(self, redis: Redis, list_key: str) -> None:
        self._redis = redis
        self._list_key = list_key
        self._add = redis.register_script(ADD)

    async def add(self, keys: list[str], seconds: float) -> None:
        """List `keys`, due in `seconds` from now; replaces an earlier time."""
        with store_errors():
            await self._add(keys=[self._list_key], args=[seconds, *keys])

    async def due(self, limit: int = -1) -> list[str]:
        """The keys that are due, the earliest first; at most `limit`, unless it is -1."""
        with store_errors():
            now, _ = await self._redis.time()
            keys: Any = await self._redis.zrange(
                self._list_key, 0, int(now) * 1000, byscore=True, offset=0, num=limit
            )
        return [key.decode() for key in keys]

    async def forget(self, keys: list[str]) -> None:
        """Take `keys` off the list: the objects are removed, or a record names them."""
        for page in pages(keys):
            with store_errors():
                await self._redis.zrem(self._list_key, *page)


def pages(keys: list[str]) -> list[list[str]]:
    return [keys[start : start + PAGE_SIZE] for start in range(0, len(keys), PAGE_SIZE)]
