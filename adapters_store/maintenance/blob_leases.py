"""Leases on unpublished blobs, the unnamed objects of adapters (see unnamed_objects.py).

    pp:staged    sorted set    blob key -> expiry of its lease (Unix ms); 0: released

Every upload writes blobs under keys of its own, and each is leased until a version names it. Publishing a
version needs its blobs' leases and removes them in the same script; expiry zeroes a lease in one script, too.
So the two exclude each other: a blob that is about to be removed can never be published. No key is reused.
"""

from typing import Any

from redis.asyncio import Redis
from redis.commands.core import AsyncScript

from adapters_store.index.keys import STAGED
from adapters_store.maintenance.unnamed_objects import UnnamedObjects, pages
from adapters_store.valkey import store_errors

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


class BlobLeases(UnnamedObjects):
    """All calls raise StoreError when Valkey does not answer."""

    def __init__(self, redis: Redis) -> None:
        super().__init__(redis, STAGED)
        self._release_expired = redis.register_script(RELEASE_EXPIRED)
        self._release = redis.register_script(RELEASE)

    async def release(self, keys: list[str]) -> list[str]:
        """Release the keys of one failed upload; those that were not published, and cannot be any more."""
        return await _run(self._release, keys)

    async def release_expired(self, keys: list[str], *, dry_run: bool = False) -> list[str]:
        """Those of `keys` that have no valid lease. Unless `dry_run`, they cannot be published any more."""
        found: list[str] = []
        for page in pages(keys):
            found += await _run(self._release_expired, [int(not dry_run), *page])
        return found


async def _run(script: AsyncScript, args: list[Any]) -> list[str]:
    with store_errors():
        keys = await script(keys=[STAGED], args=args)
    return [key.decode() for key in keys]
