"""Leases on unpublished blobs: each uploaded blob is leased until a version names it or the lease expires.

    pp:staged    sorted set    blob key -> expiry of its lease (Unix ms); 0: released

Every upload writes blobs under keys of its own and takes the leases before the first byte. Publishing a
version needs its blobs' leases and removes them in the same script; expiry zeroes a lease in one script, too.
So the two exclude each other: a blob that is about to be removed can never be published. No key is reused.
"""

from typing import Any

from redis.asyncio import Redis
from redis.commands.core import AsyncScript

from adapters_store.index.keys import STAGED
from adapters_store.valkey import store_errors

ADD = """
local time = redis.call('TIME')
local expiry = string.format('%.0f', time[1] * 1000 + ARGV[1] * 1000)
for i = 2, #ARGV do redis.call('ZADD', KEYS[1], expiry, ARGV[i]) end
"""

# Answers the keys without a valid lease. ARGV[1] = '1' also zeroes expired leases: no version can have them.
RELEASE_EXPIRED = """
local time, unleased = redis.call('TIME'), {}
for i = 2, #ARGV do
  local expiry = redis.call('ZSCORE', KEYS[1], ARGV[i])
  if not expiry or tonumber(expiry) <= time[1] * 1000 then
    if expiry and ARGV[1] == '1' then redis.call('ZADD', KEYS[1], 0, ARGV[i]) end
    table.insert(unleased, ARGV[i])
  end
end
return unleased
"""

# Zeroes the leases that the keys still have, and answers those keys; a published blob has none.
RELEASE = """
local released = {}
for _, key in ipairs(ARGV) do
  if redis.call('ZSCORE', KEYS[1], key) then
    redis.call('ZADD', KEYS[1], 0, key)
    table.insert(released, key)
  end
end
return released
"""

PAGE_SIZE = 500  # keys of one command


class BlobLeases:
    """All calls raise StoreError when Valkey does not answer."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._add = redis.register_script(ADD)
        self._release_expired = redis.register_script(RELEASE_EXPIRED)
        self._release = redis.register_script(RELEASE)

    async def add(self, keys: list[str], seconds: float) -> None:
        """Lease `keys`, which are about to be written, for `seconds`."""
        await _run(self._add, [seconds, *keys])

    async def release(self, keys: list[str]) -> list[str]:
        """Release the keys of one failed upload; those that were not published, and cannot be any more."""
        return await _run(self._release, keys)

    async def release_expired(self, keys: list[str], *, dry_run: bool = False) -> list[str]:
        """Those of `keys` that have no valid lease. Unless `dry_run`, they cannot be published any more."""
        found: list[str] = []
        for page in _pages(keys):
            found += await _run(self._release_expired, [int(not dry_run), *page])
        return found

    async def expired(self) -> list[str]:
        """Every key whose lease is released or has expired."""
        with store_errors():
            seconds, _ = await self._redis.time()
            keys: Any = await self._redis.zrange(STAGED, 0, int(seconds) * 1000, byscore=True)
        return [key.decode() for key in keys]

    async def forget(self, keys: list[str]) -> None:
        """Delete the leases of blobs that are removed or published."""
        for page in _pages(keys):
            with store_errors():
                await self._redis.zrem(STAGED, *page)


async def _run(script: AsyncScript, args: list[Any]) -> list[str]:
    with store_errors():
        keys = await script(keys=[STAGED], args=args)
    return [key.decode() for key in keys or ()]


def _pages(keys: list[str]) -> list[list[str]]:
    return [keys[start : start + PAGE_SIZE] for start in range(0, len(keys), PAGE_SIZE)]
