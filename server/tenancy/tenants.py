"""Tenants, in Valkey, and whose a secret is. Knows no HTTP and no adapters.

    pp:tenants                hash   tenant id -> Tenant

The keys of tenants are in tenant_keys.py, limits in limit_records.py. Valkey is asked at every request: a
revoked key fails, and a new limit holds, at the next one in every process.
"""

import secrets
import time
from typing import NamedTuple

import msgspec
from redis.asyncio import Redis

from adapters_store.outage import LastAnswers
from adapters_store.valkey import store_errors, text
from server.errors import InvalidField, Unauthenticated, shown
from server.tenancy.key_terms import KeyInfo, new_key_info
from server.tenancy.keys import fingerprint, new_secret, well_formed
from server.tenancy.limits import LIMITS, NO_LIMITS, Allowance, Limits, RequestLimits, decode_limits
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
CLOCK_SECONDS = 60.0  # by which our clock may be ahead of Valkey's


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
    key_limits: Allowance | None = None  # if the key has limits of its own
    adapters_limited: bool = False  # an adapter of the tenant has limits of its own

    @property
    def allowances(self) -> list[Allowance]:
        """The tenant's, and the key's."""
        own = [] if self.key_limits is None else [self.key_limits]
        return [Allowance(self.tenant.id, self.limits), *own]


class Tenants(TenantKeys):
    """All calls raise StoreError when Valkey does not answer. `defaults`: limits where a tenant has none.

    `last`: whose secrets that were used lately are, for when Valkey is away.
    """

    def __init__(
        self, redis: Redis, defaults: Limits = NO_LIMITS, last: LastAnswers[Caller | None] | None = None
    ) -> None:
        super().__init__(redis)
        self.operators_limits = defaults.without_rates()
        self._defaults = defaults
        self._last = last or LastAnswers()
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

    async def authenticate(self, secret: str) -> Caller | None:
        """Whose the secret is, in one round trip; None if it is no valid key. Expiry is by Valkey's clock.

        Raises Unauthenticated for a key that has expired.
        """
        if not well_formed(secret):
            return None
        sha256 = fingerprint(secret)
        caller = await self._last.ask(sha256, lambda: self._caller(sha256))
        if caller is not None and caller.key.has_expired(time.time() - CLOCK_SECONDS):  # without Valkey
            raise _expired()
        return caller

    async def _caller(self, sha256: str) -> Caller | None:
        with store_errors():
            found = await self._authenticate(keys=[KEYS, TENANTS, LIMITS], args=[sha256])
        if found is None or found[1] is None:
            return None
        owner, record, stored, limits, now, key_limits, adapters_limited = found
        known = msgspec.json.decode(record, type=KeyRecord)
        is_operator = text(owner) == OPERATOR_ID
        if not known.opens(sha256, float(now)) or (stored is None and not is_operator):
            return None
        if known.info.has_expired(float(now)):
            raise _expired()
        if is_operator:
            return Caller(OPERATOR, self.operators_limits, known.info)
        tenant = msgspec.json.decode(stored, type=Tenant)
        in_force = decode_limits(limits, Limits).over(self._defaults)
        own = None
        if key_limits is not None:
            id_ = f"{tenant.id}:key:{known.info.id}"
            own = Allowance(id_, decode_limits(key_limits, RequestLimits), " for this key")
        return Caller(tenant, in_force, known.info, own, bool(adapters_limited))


def _expired() -> Unauthenticated:
    return Unauthenticated("The API key has expired.", code="expired_api_key")
