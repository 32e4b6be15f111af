"""How many tenants and adapters there are: one call, for figures. Reads what the index and tenants write."""

from typing import Any, NamedTuple

from redis.asyncio import Redis

from adapters_store.valkey import store_errors

COUNT = """
local tenants = redis.call('HKEYS', 'pp:tenants')
local adapters = redis.call('ZCARD', 'pp:adapters:operator')
for _, tenant in ipairs(tenants) do adapters = adapters + redis.call('ZCARD', 'pp:adapters:' .. tenant) end
return {#tenants, adapters}
"""


class StoreCounts(NamedTuple):
    tenants: int
    adapters: int


async def store_counts(redis: Redis) -> StoreCounts:
    """Takes Valkey about a millisecond for a thousand tenants. Raises StoreError."""
    with store_errors():
        found: Any = await redis.eval(COUNT, 0)
    return StoreCounts(*map(int, found))
