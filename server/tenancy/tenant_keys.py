"""API keys in Valkey, of tenants and of the operator. Knows no HTTP.

    pp:tenants:{id}:keys      hash   key id -> KeyRecord
    pp:tenants:{id}:used      hash   key id -> Unix seconds of its last use, to about a minute
    pp:keys                   hash   SHA-256 of a secret -> "TENANT KEY"; of earlier versions "TENANT"

The operator's keys are those of the tenant `operator`; its first one is in a file (keys.py), not here.
A secret is returned once, when it is made, and not stored.
"""

import asyncio
import logging
import secrets
import time
from contextlib import suppress

import msgspec
from redis.asyncio import Redis

from adapters_store.valkey import store_errors
from server.errors import Conflict, InvalidField, NotFound, QuotaExceeded, StoreError, shown
from server.tenancy.key_terms import KeyInfo, new_key_info
from server.tenancy.keys import fingerprint, new_secret
from server.tenancy.limits import KEY_LIMITS
from server.tenancy.tenant_keys_lua import ADD, REPLACE, REVOKE, USED

log = logging.getLogger(__name__)
TENANTS = "pp:tenants"
KEYS = "pp:keys"
OPERATOR_ID = "operator"
MAX_KEYS = 100  # of a tenant; expired ones make room
LAST_USED_SECONDS = 60.0
LAST_WRITE_SECONDS = 1.0  # of a process that ends
MAX_OVERLAP_SECONDS = 30 * 86_400


class FormerSecret(msgspec.Struct, frozen=True):
    """The secret before the last rotation, which is valid until `until` (Unix seconds)."""

    sha256: str
    until: int


class KeyRecord(msgspec.Struct, frozen=True, omit_defaults=True):
    info: KeyInfo
    sha256: str
    former: FormerSecret | None = None

    def opens(self, sha256: str, now: float) -> bool:
        """Whether a secret of this hash is the key's at the time `now`."""
        former = self.former
        overlaps = former is not None and former.sha256 == sha256 and now < former.until
        return self.sha256 == sha256 or overlaps


class Key(msgspec.Struct, frozen=True):
    """What the key's owner sees of it."""

    info: KeyInfo
    overlap_until: int | None = None  # Unix seconds; until then the former secret is valid, too
    last_used: int | None = None


class TenantKeys:
    """All calls raise StoreError when Valkey does not answer."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._add = redis.register_script(ADD)
        self._replace = redis.register_script(REPLACE)
        self._revoke = redis.register_script(REVOKE)
        self._used = redis.register_script(USED)
        self._last_used: dict[tuple[str, str], int] = {}  # (tenant, key) -> Unix seconds; not written yet

    async def add_key(self, tenant_id: str, info: KeyInfo | None = None) -> tuple[KeyInfo, str]:
        """A new key and its secret. Raises NotFound, QuotaExceeded."""
        info, secret = info or new_key_info(new_key_id(), time.time()), new_secret()
        record = KeyRecord(info, fingerprint(secret))
        answer = await self._insert(tenant_id, record)
        if answer == b"full" and await self._revoke_expired(tenant_id):
            answer = await self._insert(tenant_id, record)
        if answer == b"full":
            raise QuotaExceeded(f"A tenant may have {MAX_KEYS} keys; revoke one first.")
        if answer == b"unknown":
            raise unknown_tenant(tenant_id)
        return info, secret

    async def keys(self, tenant_id: str) -> list[Key]:
        """Oldest first. Raises NotFound."""
        with store_errors():
            async with self._redis.pipeline(transaction=True) as pipeline:
                pipeline.hexists(TENANTS, tenant_id)
                pipeline.hvals(keys_of(tenant_id))
                pipeline.hgetall(used_of(tenant_id))
                known, values, used = await pipeline.execute()
        if not known and tenant_id != OPERATOR_ID:
            raise unknown_tenant(tenant_id)
        records = [msgspec.json.decode(value, type=KeyRecord) for value in values]
        keys = [_key(record, used.get(record.info.id.encode())) for record in records]
        return sorted(keys, key=lambda key: (key.info.created, key.info.id))

    async def key(self, tenant_id: str, key_id: str) -> KeyInfo:
        """Raises NotFound."""
        return (await self._record(tenant_id, key_id))[0].info

    async def rotate(self, tenant_id: str, key_id: str, overlap_seconds: int) -> tuple[Key, str]:
        """A new secret of the key; the one before is valid for `overlap_seconds` more.

        Raises InvalidField, NotFound, and Conflict while the overlap of an earlier rotation lasts (unless
        `overlap_seconds` is 0, which ends all former secrets) and of two rotations at once for the later.
        """
        if not 0 <= overlap_seconds <= MAX_OVERLAP_SECONDS:
            raise InvalidField(
                f"overlap_seconds must be 0 to {MAX_OVERLAP_SECONDS}, not {shown(overlap_seconds)}.",
                param="overlap_seconds",
            )
        record, stored = await self._record(tenant_id, key_id)
        now = int(time.time())
        if record.info.has_expired(now):
            raise Conflict(f"The key {shown(key_id)} has expired; make a new one.")
        former = record.former
        if overlap_seconds and former and now < former.until:
            raise Conflict(
                f"The key {shown(key_id)} was rotated before, and its former secret is valid until "
                f"{former.until}; with overlap_seconds 0 both former secrets end at once."
            )
        secret = new_secret()
        overlap = FormerSecret(record.sha256, now + overlap_seconds) if overlap_seconds else None
        new = KeyRecord(record.info, fingerprint(secret), overlap)
        ended = [] if former is None else [former.sha256]
        ended += [] if overlap else [record.sha256]
        with store_errors():
            done = await self._replace(
                keys=[keys_of(tenant_id), KEYS],
                args=[tenant_id, key_id, stored, msgspec.json.encode(new), new.sha256, *ended],
            )
        if not done:
            raise Conflict(f"The key {shown(key_id)} was rotated or revoked by another request just now.")
        return _key(new, None), secret

    async def revoke(self, tenant_id: str, key_id: str) -> None:
        """End the key at once. Raises NotFound."""
        if not await self._end(tenant_id, key_id):
            raise unknown_key(key_id)

    def note_use(self, tenant_id: str, key_id: str) -> None:
        """Remember that the key was used now, for `write_last_used`."""
        self._last_used[tenant_id, key_id] = int(time.time())

    async def keep_last_used(self) -> None:
        """Write what `note_use` remembers, once a minute and when cancelled. Run one a process."""
        try:
            while True:
                await asyncio.sleep(LAST_USED_SECONDS)
                await self.write_last_used()
        finally:
            with suppress(TimeoutError):
                async with asyncio.timeout(LAST_WRITE_SECONDS):
                    await self.write_last_used()

    async def write_last_used(self) -> None:
        """Write the last use of every key that was used since the last call: one call of Valkey for all."""
        if not self._last_used:
            return
        noted, self._last_used = self._last_used, {}
        names = [name for tenant, _ in noted for name in (keys_of(tenant), used_of(tenant))]
        pairs = [value for (_, key), at in noted.items() for value in (key, at)]
        try:
            with store_errors():
                await self._used(keys=names, args=pairs)
        except StoreError as error:
            self._last_used = noted | self._last_used
            log.warning("The last use of %d keys could not be written: %s", len(noted), error.message)

    async def _insert(self, tenant_id: str, record: KeyRecord) -> bytes:
        with store_errors():
            answer: bytes = await self._add(
                keys=[TENANTS, keys_of(tenant_id), KEYS],
                args=[tenant_id, record.info.id, msgspec.json.encode(record), record.sha256, MAX_KEYS],
            )
        return answer

    async def _revoke_expired(self, tenant_id: str) -> bool:
        """Whether there were any."""
        now = time.time()
        expired = [key.info.id for key in await self.keys(tenant_id) if key.info.has_expired(now)]
        for key_id in expired:
            await self._end(tenant_id, key_id)
        return bool(expired)

    async def _end(self, tenant_id: str, key_id: str) -> bool:
        """Whether there was such a key."""
        keys = [keys_of(tenant_id), KEYS, used_of(tenant_id), KEY_LIMITS]
        with store_errors():
            return bool(await self._revoke(keys=keys, args=[key_id, tenant_id]))

    async def _record(self, tenant_id: str, key_id: str) -> tuple[KeyRecord, bytes]:
        """The key's record, and as it is stored. Raises NotFound."""
        with store_errors():
            stored = await self._redis.hget(keys_of(tenant_id), key_id)
        if stored is None:
            raise unknown_key(key_id)
        assert isinstance(stored, bytes)  # the client decodes nothing
        return msgspec.json.decode(stored, type=KeyRecord), stored


def new_key_id() -> str:
    return f"key_{secrets.token_hex(8)}"


def keys_of(tenant_id: str) -> str:
    return f"pp:tenants:{tenant_id}:keys"


def used_of(tenant_id: str) -> str:
    return f"pp:tenants:{tenant_id}:used"


def unknown_tenant(tenant_id: str) -> NotFound:
    return NotFound(f"There is no tenant {shown(tenant_id)}.")


def unknown_key(key_id: str) -> NotFound:
    return NotFound(f"There is no key {shown(key_id)}.")


def _key(record: KeyRecord, used: bytes | None) -> Key:
    overlap = record.former.until if record.former else None
    ended = overlap is not None and overlap <= time.time()
    return Key(record.info, None if ended else overlap, None if used is None else int(used))
