"""Blobs that no version has yet: whose they are, and when they become nobody's.

    pp:staged    sorted set    blob key -> until when (ms) it is kept for its writer; 0: it is nobody's

Every upload writes under keys of its own, named here before the first byte. Making a version of them needs
them here and takes them off, in one script; so does declaring them nobody's. Whichever comes first, the other
fails: a blob that is about to be removed can never come to be named, and no key ever comes back.
"""

from typing import Any

from redis.asyncio import Redis

from adapters_store.index.index import STAGED
from adapters_store.valkey import store_errors

STAGE = """
local time = redis.call('TIME')
local until_ = string.format('%.0f', time[1] * 1000 + ARGV[1] * 1000)
for i = 2, #ARGV do redis.call('ZADD', KEYS[1], until_, ARGV[i]) end
"""

# Those that nobody may make a version of from now on: declared so, or not here at all.
RELEASE_EXPIRED = """
local time, nobodys = redis.call('TIME'), {}
for i = 2, #ARGV do
  local score = redis.call('ZSCORE', KEYS[1], ARGV[i])
  if not score or tonumber(score) <= time[1] * 1000 then
    if score and ARGV[1] == '1' then redis.call('ZADD', KEYS[1], 0, ARGV[i]) end
    table.insert(nobodys, ARGV[i])
  end
end
return nobodys
"""

# Those of an upload that has failed and that no version has taken, which none can from now on.
RELEASE = """
local given = {}
for _, key in ipairs(ARGV) do
  if redis.call('ZSCORE', KEYS[1], key) then
    redis.call('ZADD', KEYS[1], 0, key)
    table.insert(given, key)
  end
end
return given
"""

PAGE_SIZE = 500


class BlobLeases:
    """All calls raise StoreError when Valkey does not answer."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._stage = redis.register_script(STAGE)
        self._condemn = redis.register_script(RELEASE_EXPIRED)
        self._give_up = redis.register_script(RELEASE)

    async def add(self, keys: list[str], seconds: float) -> None:
        """These are about to be written; they are kept for so long, for a version to come."""
        with store_errors():
            await self._stage(keys=[STAGED], args=[seconds, *keys])

    async def give_up(self, keys: list[str]) -> list[str]:
        """Of the keys of one upload those that are nobody's from now on: no version has them."""
        with store_errors():
            given = await self._give_up(keys=[STAGED], args=keys)
        return [key.decode() for key in given]

    async def condemn(self, keys: list[str], *, dry_run: bool = False) -> list[str]:
        """Of `keys` those that are nobody's, from now on and for ever."""
        found: list[str] = []
        for start in range(0, len(keys), PAGE_SIZE):
            with store_errors():
                page = await self._condemn(
                    keys=[STAGED], args=[int(not dry_run), *keys[start : start + PAGE_SIZE]]
                )
            found += [key.decode() for key in page]
        return found

    async def expired(self) -> list[str]:
        """Those that are nobody's, or may be declared so."""
        with store_errors():
            seconds, _ = await self._redis.time()
            keys: Any = await self._redis.zrange(STAGED, 0, int(seconds) * 1000, byscore=True)
        return [key.decode() for key in keys]

    async def forget(self, keys: list[str]) -> None:
        """They are removed, or a version has them."""
        for start in range(0, len(keys), PAGE_SIZE):
            with store_errors():
                await self._redis.zrem(STAGED, *keys[start : start + PAGE_SIZE])
