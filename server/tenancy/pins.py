"""Which adapters tenants have pinned, in Valkey. Knows no engine, and not whether there are such adapters.

pp:pins             set          tenants that have pinned anything
pp:pins:{tenant}    sorted set   models as a request names them (name, name@alias, name@version), oldest first
"""

import time
from typing import Any

from redis.asyncio import Redis

from adapters_store.valkey import store_errors, text
from server.errors import QuotaExceeded

PINS = "pp:pins"

ADD = """
local tenants, models = unpack(KEYS)
local tenant, model, now, max = ARGV[1], ARGV[2], ARGV[3], tonumber(ARGV[4])
if not redis.call('ZSCORE', models, model) then
  if redis.call('ZCARD', models) >= max then return 0 end
  redis.call('ZADD', models, now, model)
end
redis.call('SADD', tenants, tenant)
return 1
"""

REMOVE = """
local tenants, models = unpack(KEYS)
redis.call('ZREM', models, ARGV[2])
if redis.call('ZCARD', models) == 0 then redis.call('SREM', tenants, ARGV[1]) end
"""


class Pins:
    """All calls raise StoreError when Valkey does not answer."""

    def __init__(self, redis: Redis, max_pins: int) -> None:
        self._redis = redis
        self._max_pins = max_pins
        self._add = redis.register_script(ADD)
        self._remove = redis.register_script(REMOVE)

    async def add(self, tenant: str, model: str) -> None:
        """Raises QuotaExceeded for one too many."""
        with store_errors():
            done = await self._add(keys=_keys(tenant), args=[tenant, model, time.time(), self._max_pins])
        if not done:
            raise QuotaExceeded(f"A tenant may pin {self._max_pins} adapters; unpin one first.")

    async def remove(self, tenant: str, model: str) -> None:
        """Nothing happens if it is not pinned."""
        with store_errors():
            await self._remove(keys=_keys(tenant), args=[tenant, model])

    async def of(self, tenant: str) -> list[str]:
        with store_errors():
            found: Any = await self._redis.zrange(_keys(tenant)[1], 0, -1)
        return [text(model) for model in found]

    async def all(self) -> list[tuple[str, str]]:
        """(tenant, model) of everybody."""
        with store_errors():
            tenants = sorted(text(tenant) for tenant in await self._redis.smembers(PINS))
        return [(tenant, model) for tenant in tenants for model in await self.of(tenant)]


def _keys(tenant: str) -> list[str]:
    return [PINS, f"{PINS}:{tenant}"]
