"""The limits that are set, in Valkey: of tenants, of their keys and of their adapters.

    pp:limits                      hash   tenant id -> Limits
    pp:limits:keys                 hash   "TENANT KEY" (ids) -> RequestLimits
    pp:limits:adapters:{tenant}    hash   adapter name -> RequestLimits

A record without a limit is no field. Its ETag is of its content, so a change can be made on condition that
nobody else has made one.
"""

import hashlib
from typing import Generic, NamedTuple

import msgspec
from redis.asyncio import Redis

from adapters_store.outage import LastAnswers
from adapters_store.valkey import store_errors, text
from server.errors import NotFound, PreconditionFailed, QuotaExceeded, shown
from server.tenancy.limits import (
    ADAPTER_LIMITS,
    KEY_LIMITS,
    LIMITS,
    NO_LIMITS,
    Allowance,
    AnyLimits,
    Limits,
    RequestLimits,
    decode_limits,
)
from server.tenancy.tenant_keys import TENANTS, keys_of, unknown_key, unknown_tenant

MAX_RECORDS = 1_000_000  # of tenants, and of keys: both are the operator's to make
MAX_ADAPTER_RECORDS = 1000  # of a tenant

# KEYS: the records, what they are of; ARGV: field, record or '', condition (http/etags.py), most records,
# field of KEYS[2] that must exist, or ''. Sent twice, it is done once.
SET = """
local records, owners = unpack(KEYS)
local field, record, condition, max, owner = unpack(ARGV)
if owner ~= '' and redis.call('HEXISTS', owners, owner) == 0 then return 'unknown' end
local old = redis.call('HGET', records, field) or ''
if old == record then return 'done' end
local tag = string.sub(redis.sha1hex(old), 1, 32)
if condition ~= '' and condition ~= '*' and not string.find(condition, tag, 1, true) then return 'changed' end
if record == '' then redis.call('HDEL', records, field) return 'done' end
if old == '' and redis.call('HLEN', records) >= tonumber(max) then return 'too many' end
redis.call('HSET', records, field, record)
return 'done'
"""


class Stored(NamedTuple, Generic[AnyLimits]):
    limits: AnyLimits
    etag: str


class LimitRecords:
    """All calls raise StoreError when Valkey does not answer. `defaults`: where a tenant has none.

    `condition`: of a change, as http/etags.py reads it; PreconditionFailed if it does not hold.
    """

    def __init__(
        self, redis: Redis, defaults: Limits = NO_LIMITS, last: LastAnswers[list[Allowance]] | None = None
    ) -> None:
        self.defaults = defaults
        self._last = last or LastAnswers()
        self._redis = redis
        self._set = redis.register_script(SET)

    async def in_force(self, tenant: str) -> Limits:
        """What holds for a tenant now; for one that does not exist, and for the operator, the defaults."""
        return decode_limits(await self._record(LIMITS, tenant), Limits).over(self.defaults)

    async def of_tenant(self, tenant: str) -> Stored[Limits]:
        """As they are set. Raises NotFound."""
        with store_errors():
            found = await self._redis.hexists(TENANTS, tenant)
        if not found:
            raise unknown_tenant(tenant)
        return _stored(await self._record(LIMITS, tenant), Limits)

    async def set_tenant(self, tenant: str, limits: Limits, condition: str = "") -> Stored[Limits]:
        """Replace all limits of the tenant: of two at once the last holds, whole. Raises NotFound."""
        return await self._replace(LIMITS, tenant, limits, condition, TENANTS, tenant, unknown_tenant(tenant))

    async def of_key(self, tenant: str, key: str) -> Stored[RequestLimits]:
        """Raises NotFound."""
        if await self._record(keys_of(tenant), key) is None:
            raise unknown_key(key)
        return _stored(await self._record(KEY_LIMITS, f"{tenant} {key}"), RequestLimits)

    async def set_key(
        self, tenant: str, key: str, limits: RequestLimits, condition: str = ""
    ) -> Stored[RequestLimits]:
        """Replace all limits of the key with the id `key`. They end with it. Raises NotFound."""
        field, keys = f"{tenant} {key}", keys_of(tenant)
        return await self._replace(KEY_LIMITS, field, limits, condition, keys, key, unknown_key(key))

    async def of_adapter(self, tenant: str, name: str) -> Stored[RequestLimits]:
        """None of them for an adapter that has none, or does not exist."""
        return _stored(await self._record(f"{ADAPTER_LIMITS}{tenant}", name), RequestLimits)

    async def set_adapter(
        self, tenant: str, name: str, limits: RequestLimits, condition: str = ""
    ) -> Stored[RequestLimits]:
        """Replace all limits of the adapter of this name. They outlive it. Raises QuotaExceeded."""
        records = f"{ADAPTER_LIMITS}{tenant}"
        return await self._replace(records, name, limits, condition, "", "", NotFound(""))

    async def of_adapters(self, tenant: str, names: list[str]) -> list[Allowance]:
        """Of the adapters that have limits; of adapters that were used lately also while Valkey is away."""
        return await self._last.ask((tenant, *names), lambda: self._of_adapters(tenant, names))

    async def _of_adapters(self, tenant: str, names: list[str]) -> list[Allowance]:
        with store_errors():
            records = await self._redis.hmget(f"{ADAPTER_LIMITS}{tenant}", names)
        return [
            Allowance(
                f"{tenant}:adapter:{name}",
                decode_limits(record, RequestLimits),
                f" for adapter {shown(name)}",
            )
            for name, record in zip(names, records, strict=True)
            if record is not None
        ]

    async def _record(self, records: str, field: str) -> bytes | None:
        with store_errors():
            found: bytes | None = await self._redis.hget(records, field)  # type: ignore[assignment]  # bytes
        return found

    async def _replace(
        self,
        records: str,
        field: str,
        limits: AnyLimits,
        condition: str,
        owners: str,
        owner: str,
        unknown: NotFound,
    ) -> Stored[AnyLimits]:
        """Set one record, if `owner` is a field of the hash `owners`, or is ""."""
        record = b"" if limits == type(limits)() else msgspec.json.encode(limits)
        most = MAX_RECORDS if owner else MAX_ADAPTER_RECORDS
        with store_errors():
            answer = text(
                await self._set(keys=[records, owners], args=[field, record, condition, most, owner])
            )
        if answer == "unknown":
            raise unknown
        if answer == "changed":
            raise PreconditionFailed("The limits are not as If-Match says.", param="If-Match")
        if answer == "too many":
            raise QuotaExceeded(f"At most {most} of a tenant's adapters can have limits; remove some first.")
        return _stored(record, type(limits))


def _stored(record: bytes | None, kind: type[AnyLimits]) -> Stored[AnyLimits]:
    etag = hashlib.sha1(record or b"", usedforsecurity=False).hexdigest()[:32]
    return Stored(decode_limits(record or None, kind), etag)
