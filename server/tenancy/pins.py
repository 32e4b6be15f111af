"""The adapters that tenants have pinned, in Valkey. Knows no engine, and not whether the adapters exist.

pp:pins             set          tenants with pins
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
        """Pin `model`; twice changes nothing. Raises QuotaExceeded."""
        with store_errors():
            added = await self._add(keys=_keys(tenant), args=[tenant, model, time.time(), self._max_pins])
        if not added:
            raise QuotaExceeded(f"A tenant may pin {self._max_pins} adapters; unpin one first.")

    async def remove(self, tenant: str, model: str) -> None:
        """Unpin `model`, if it is pinned."""
        with store_errors():
            await self._remove(keys=_keys(tenant), args=[tenant, model])

    async def of(self, tenant: str) -> list[str]:
        """The tenant's pinned models, oldest first."""
        with store_errors():
            found: Any = await self._redis.zrange(_keys(tenant)[1], 0, -1)
        return [text(model) for model in found]

    async def all(self) -> list[tuple[str, str]]:
        """(tenant, model) of every pin."""
        with store_errors():
            tenants = sorted(text(tenant) for tenant in await self._redis.smembers(PINS))
        return [(tenant, model) for tenant in tenants for model in await self.of(tenant)]


def _keys(tenant: str) -> list[str]:
    return [PINS, f"{PINS}:{tenant}"]
