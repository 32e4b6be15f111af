"""Tenants and their limits, in Valkey, and whose a secret is. Knows no HTTP and no adapters.

    pp:tenants                hash   tenant id -> Tenant
    pp:limits                 hash   tenant id -> Limits, as the operator set them

The keys of tenants are in tenant_keys.py. Nothing is cached: a revoked key fails, and a new limit holds, at
the next request in every process.
"""

import secrets
import time
from typing import NamedTuple

import msgspec
from redis.asyncio import Redis

from adapters_store.valkey import store_errors, text
from server.errors import InvalidField, Unauthenticated, shown
from server.tenancy.key_terms import KeyInfo, new_key_info
from server.tenancy.keys import fingerprint, new_secret, well_formed
from server.tenancy.limits import NO_LIMITS, Limits
from server.tenancy.tenant_keys import (
    KEYS,
    OPERATOR_ID,
    TENANTS,
    KeyRecord,
    TenantKeys,
    keys_of,
    new_key_id,
    unknown_tenant,
)
from server.tenancy.tenant_keys_lua import AUTHENTICATE

MAX_NAME = 64
MAX_WEIGHT = 1000.0
LIMITS = "pp:limits"

SET_LIMITS = """
if redis.call('HEXISTS', KEYS[1], ARGV[1]) == 0 then return 0 end
redis.call('HSET', KEYS[2], ARGV[1], ARGV[2])
return 1
"""


class Tenant(msgspec.Struct, frozen=True):
    """The owner of adapters, files and jobs. `id` is generated; `name` is only displayed."""

    id: str
    name: str
    weight: float  # share of the engine when tenants queue
    created: int  # Unix seconds


# The tenant of the operator's key on tenants' routes: owns what the operator loads there.
OPERATOR = Tenant(id=OPERATOR_ID, name="operator", weight=1.0, created=0)
# The operator's first key, out of a file: it can be changed there, and is never revoked here.
OPERATOR_KEY = KeyInfo(OPERATOR_ID, created=0, name="admin.key")


class Caller(NamedTuple):
    """Whose a secret is: the tenant, its limits in force, and the key."""

    tenant: Tenant
    limits: Limits
    key: KeyInfo


class Tenants(TenantKeys):
    """All calls raise StoreError when Valkey does not answer. `defaults`: limits where a tenant has none."""

    def __init__(self, redis: Redis, defaults: Limits = NO_LIMITS) -> None:
        super().__init__(redis)
        self.defaults = defaults
        self._set_limits = redis.register_script(SET_LIMITS)
        self._authenticate = redis.register_script(AUTHENTICATE)

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
        secret = new_secret()
        record = KeyRecord(new_key_info(new_key_id(), tenant.created), fingerprint(secret))
        key_id = record.info.id
        with store_errors():
            async with self._redis.pipeline(transaction=True) as transaction:
                transaction.hset(TENANTS, tenant.id, msgspec.json.encode(tenant))
                transaction.hset(keys_of(tenant.id), key_id, msgspec.json.encode(record))
                transaction.hset(KEYS, record.sha256, f"{tenant.id} {key_id}")
                await transaction.execute()
        return tenant, secret

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
            raise unknown_tenant(tenant_id)
        return msgspec.json.decode(value, type=Tenant)

    async def limits(self, tenant_id: str) -> Limits:
        """As they are set for this tenant. Raises NotFound."""
        await self.get(tenant_id)
        with store_errors():
            value = await self._redis.hget(LIMITS, tenant_id)
        return _decode_limits(value)

    async def set_limits(self, tenant_id: str, limits: Limits) -> None:
        """Replace all limits of the tenant: of two at once the last holds, whole. Raises NotFound."""
        with store_errors():
            done = await self._set_limits(
                keys=[TENANTS, LIMITS], args=[tenant_id, msgspec.json.encode(limits)]
            )
        if not done:
            raise unknown_tenant(tenant_id)

    async def authenticate(self, secret: str) -> Caller | None:
        """Whose the secret is, in one round trip; None if it is no valid key. Expiry is by Valkey's clock.

        Raises Unauthenticated for a key that has expired.
        """
        if not well_formed(secret):
            return None
        sha256 = fingerprint(secret)
        with store_errors():
            found = await self._authenticate(keys=[KEYS, TENANTS, LIMITS], args=[sha256])
        if found is None or found[1] is None:
            return None
        owner, record, stored, limits, now = found
        known = msgspec.json.decode(record, type=KeyRecord)
        is_operator = text(owner) == OPERATOR_ID
        if not known.opens(sha256, float(now)) or (stored is None and not is_operator):
            return None
        if known.info.has_expired(float(now)):
            raise Unauthenticated("The API key has expired.", code="expired_api_key")
        if is_operator:
            return Caller(OPERATOR, NO_LIMITS, known.info)
        tenant = msgspec.json.decode(stored, type=Tenant)
        return Caller(tenant, _decode_limits(limits).over(self.defaults), known.info)


def _decode_limits(value: bytes | str | None) -> Limits:
    return NO_LIMITS if value is None else msgspec.json.decode(value, type=Limits)
