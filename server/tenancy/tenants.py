"""Tenants and their keys, in Valkey. Knows no HTTP and no adapters.

    pp:tenants                hash   tenant id -> Tenant
    pp:tenants:{id}:keys      hash   key id -> KeyRecord
    pp:keys                   hash   SHA-256 of a secret -> tenant id

Their limits: limit_records.py. A secret is returned once, when it is created, and not stored. Valkey is
asked at every request: a revoked key fails, and a new limit holds, at the next one in every process.
"""

import secrets
import time
from typing import NamedTuple

import msgspec
from redis.asyncio import Redis

from adapters_store.outage import LastAnswers
from adapters_store.valkey import store_errors
from server.errors import InvalidField, NotFound, shown
from server.tenancy.keys import fingerprint, new_secret, well_formed
from server.tenancy.limits import (
    ADAPTER_LIMITS,
    KEY_LIMITS,
    LIMITS,
    NO_LIMITS,
    Allowance,
    Limits,
    RequestLimits,
    decode_limits,
)

MAX_NAME = 64
MAX_WEIGHT = 1000.0
TENANTS = "pp:tenants"
KEYS = "pp:keys"

AUTHENTICATE = """
local id = redis.call('HGET', KEYS[1], ARGV[1])
return id and {redis.call('HGET', KEYS[2], id), redis.call('HGET', KEYS[3], id),
               redis.call('HGET', KEYS[4], ARGV[1]), redis.call('EXISTS', ARGV[2] .. id)}
"""

REVOKE = """
if redis.call('HDEL', KEYS[1], ARGV[1]) == 0 then return 0 end
redis.call('HDEL', KEYS[2], ARGV[2])
redis.call('HDEL', KEYS[3], ARGV[2])
return 1
"""


class Tenant(msgspec.Struct, frozen=True):
    """The owner of adapters, files and jobs. `id` is generated; `name` is only displayed."""

    id: str
    name: str
    weight: float  # share of the engine when tenants queue
    created: int  # Unix seconds


# The tenant of the operator's key on tenants' routes: owns what the operator loads there.
OPERATOR = Tenant(id="operator", name="operator", weight=1.0, created=0)


class KeyInfo(msgspec.Struct, frozen=True):
    """The public part of a key: neither its secret nor anything derived from it."""

    id: str
    created: int


class KeyRecord(msgspec.Struct, frozen=True):
    info: KeyInfo
    sha256: str


class Access(NamedTuple):
    """What a key opens."""

    tenant: Tenant
    limits: Limits  # of the tenant, in force
    key: Allowance | None = None  # if the key has limits of its own
    adapters_limited: bool = False  # an adapter of the tenant has limits of its own


class Tenants:
    """All calls raise StoreError when Valkey does not answer. `defaults`: limits where a tenant has none.

    `last`: what keys that were used lately opened, for when Valkey is away.
    """

    def __init__(
        self, redis: Redis, defaults: Limits = NO_LIMITS, last: LastAnswers[Access | None] | None = None
    ) -> None:
        self._defaults = defaults
        self._last = last or LastAnswers()
        self._redis = redis
        self._authenticate = redis.register_script(AUTHENTICATE)
        self._revoke = redis.register_script(REVOKE)

    async def create(self, name: str, weight: float = 1.0) -> tuple[Tenant, str]:
        """A new tenant and its first secret. Names need not be unique. Raises InvalidField."""
        if not name or len(name) > MAX_NAME or not name.isprintable():
            raise InvalidField(
                f"name {shown(name)} must have 1 to {MAX_NAME} printable characters.", param="name"
            )
        if not 0 < weight <= MAX_WEIGHT:
            raise InvalidField(
                f"weight {shown(weight)} must be over 0 and at most {MAX_WEIGHT:g}.", param="weight"
            )
        tenant = Tenant(f"ten_{secrets.token_hex(12)}", name, weight, int(time.time()))
        _, secret = await self._write_key(tenant.id, new=tenant)
        return tenant, secret

    async def add_key(self, tenant_id: str) -> tuple[KeyInfo, str]:
        """A new key and its secret. Raises NotFound."""
        await self.get(tenant_id)
        return await self._write_key(tenant_id)

    async def keys(self, tenant_id: str) -> list[KeyInfo]:
        """Oldest first. Raises NotFound."""
        await self.get(tenant_id)
        with store_errors():
            records = await self._redis.hvals(keys_of(tenant_id))
        infos = [msgspec.json.decode(record, type=KeyRecord).info for record in records]
        return sorted(infos, key=lambda info: (info.created, info.id))

    async def key_id(self, tenant_id: str, secret: str) -> str:
        """The id of the tenant's key with this secret; "revoked" if there is none any more."""
        with store_errors():
            values = await self._redis.hvals(keys_of(tenant_id))
        records = [msgspec.json.decode(value, type=KeyRecord) for value in values]
        sha256 = fingerprint(secret)
        return next((record.info.id for record in records if record.sha256 == sha256), "revoked")

    async def revoke(self, tenant_id: str, key_id: str) -> None:
        """Remove the key. Raises NotFound."""
        with store_errors():
            found = await self._redis.hget(keys_of(tenant_id), key_id)
        if found is None:
            raise NotFound(f"There is no key {shown(key_id)}.")
        record = msgspec.json.decode(found, type=KeyRecord)
        with store_errors():
            await self._revoke(keys=[keys_of(tenant_id), KEYS, KEY_LIMITS], args=[key_id, record.sha256])

    async def list(self) -> list[Tenant]:
        """Oldest first."""
        with store_errors():
            values = await self._redis.hvals(TENANTS)
        tenants = [msgspec.json.decode(value, type=Tenant) for value in values]
        return sorted(tenants, key=lambda tenant: (tenant.created, tenant.id))

    async def get(self, tenant_id: str) -> Tenant:
        """Raises NotFound."""
        with store_errors():
            value = await self._redis.hget(TENANTS, tenant_id)
        if value is None:
            raise NotFound(f"There is no tenant {shown(tenant_id)}.")
        return msgspec.json.decode(value, type=Tenant)

    async def authenticate(self, secret: str) -> Access | None:
        """What the secret opens, with all limits, in one round trip; None if it is no valid key."""
        if not well_formed(secret):
            return None
        sha256 = fingerprint(secret)
        return await self._last.ask(sha256, lambda: self._access(sha256))

    async def _access(self, sha256: str) -> Access | None:
        with store_errors():
            found = await self._authenticate(
                keys=[KEYS, TENANTS, LIMITS, KEY_LIMITS], args=[sha256, ADAPTER_LIMITS]
            )
        if found is None or found[0] is None:
            return None
        tenant, limits = msgspec.json.decode(found[0], type=Tenant), decode_limits(found[1], Limits)
        key = found[2] and Allowance(
            f"{tenant.id}:key:{sha256}", decode_limits(found[2], RequestLimits), " for this key"
        )
        return Access(tenant, limits.over(self._defaults), key, bool(found[3]))

    async def _write_key(self, tenant_id: str, new: Tenant | None = None) -> tuple[KeyInfo, str]:
        secret = new_secret()
        info = KeyInfo(f"key_{secrets.token_hex(8)}", int(time.time()))
        record = KeyRecord(info, fingerprint(secret))
        with store_errors():
            async with self._redis.pipeline(transaction=True) as transaction:
                if new is not None:
                    transaction.hset(TENANTS, tenant_id, msgspec.json.encode(new))
                transaction.hset(keys_of(tenant_id), info.id, msgspec.json.encode(record))
                transaction.hset(KEYS, record.sha256, tenant_id)
                await transaction.execute()
        return info, secret


def keys_of(tenant_id: str) -> str:
    return f"pp:tenants:{tenant_id}:keys"
