"""Records, in Valkey, of presigned uploads: the client sends the bytes directly to the object store.

    pp:directs:{tenant}          zset    pending uploads -> expiry (Unix s)
    pp:direct:{tenant}:{id}      hash    `fixed` (JSON), `status`, `expires`; `first` since the first attempt
                                         to complete it, `claim` and `claimed` (s) during an attempt;
                                         `version` and `asked` once it is completed
    tenants/{tenant}/direct/{id}/{number}    the bytes, scheduled for removal from the beginning

An upload is pending until it is completed, cancelled or expired. Completion runs under a claim, which expires
after CLAIM_SECONDS unless it is renewed. `first` is the lowest version number that the first claimant could
have published, so that a later claimant can find a version that was published by one that died. Each change
is one idempotent script. Times are Valkey's own. Knows no URL and no adapter.
"""

import secrets
from typing import Literal

import msgspec
from redis.asyncio import Redis
from redis.commands.core import AsyncScript

from adapters_store.names import TENANTS
from adapters_store.valkey import store_errors, text
from server.errors import Conflict, NotFound, QuotaExceeded, shown

LIFE_SECONDS = 3600
KEPT_SECONDS = 24 * 3600  # after its expiry, so that a late caller learns its status
CLAIM_SECONDS = 30  # unless renewed
Status = Literal["pending", "completed", "cancelled", "expired"]

PRELUDE = """
local upload, pending = unpack(KEYS)
local now = tonumber(redis.call('TIME')[1])
local function status()
  local stored = redis.call('HGET', upload, 'status')
  if stored == 'pending' and tonumber(redis.call('HGET', upload, 'expires')) <= now then return 'expired' end
  return stored
end
"""
CREATE = """
if redis.call('EXISTS', upload) == 1 then return 1 end
redis.call('ZREMRANGEBYSCORE', pending, '-inf', now)
if redis.call('ZCARD', pending) >= tonumber(ARGV[3]) then return 0 end
local expires = now + ARGV[4]
redis.call('HSET', upload, 'fixed', ARGV[2], 'status', 'pending', 'expires', expires)
redis.call('EXPIREAT', upload, expires + ARGV[5])
redis.call('ZADD', pending, expires, ARGV[1])
return 1
"""
CLAIM = """
local current = status()
if current ~= 'pending' then return current end
local holder, since = unpack(redis.call('HMGET', upload, 'claim', 'claimed'))
if holder and holder ~= ARGV[1] and tonumber(since) + ARGV[2] > now then return 'busy' end
redis.call('HSET', upload, 'claim', ARGV[1], 'claimed', now)
redis.call('HSETNX', upload, 'first', ARGV[3])
return 'claimed'
"""
RELEASE = """
if redis.call('HGET', upload, 'claim') == ARGV[1] then redis.call('HDEL', upload, 'claim', 'claimed') end
return 'released'
"""
FINISH = """
local stored, since = unpack(redis.call('HMGET', upload, 'status', 'claimed'))
if ARGV[2] == 'cancelled' and since and tonumber(since) + ARGV[5] > now then return 'busy' end
if stored == 'pending' then
  redis.call('HSET', upload, 'status', ARGV[2], 'version', ARGV[3], 'asked', ARGV[4])
  redis.call('HDEL', upload, 'claim', 'claimed')
  redis.call('ZREM', pending, ARGV[1])
end
return redis.call('HGET', upload, 'status')
"""


class AnnouncedFile(msgspec.Struct, frozen=True):
    name: str
    bytes: int


class PresignedUpload(msgspec.Struct, frozen=True, kw_only=True):
    id: str  # adup_...
    tenant: str
    name: str  # of the adapter
    files: list[AnnouncedFile]
    create_only: bool = False
    allow_noop: bool = False
    created: int  # Unix seconds
    # fields of their own in the hash, because they change
    expires: int = 0
    status: Status = "pending"
    asked: str = ""  # once completed: the request that completed it
    first: int = 0  # the lowest version number it can have been published under; 0: never claimed
    version: int = 0  # once completed
    now: int = 0  # Valkey's time when this was read

    @property
    def prefix(self) -> str:
        return f"{TENANTS}/{self.tenant}/direct/{self.id}/"

    def key(self, number: int) -> str:
        """Object key of files[number]; no text of the tenant's is part of it."""
        return f"{self.prefix}{number}"


class PresignedUploads:
    """All calls raise StoreError, and NotFound for an unknown upload or another tenant's."""

    def __init__(self, redis: Redis, max_pending: int) -> None:
        self._redis = redis
        self._max_pending = max_pending
        scripts = (CREATE, CLAIM, RELEASE, FINISH)
        self._create, self._claim, self._release, self._finish = (
            redis.register_script(PRELUDE + script) for script in scripts
        )

    async def create(self, upload: PresignedUpload) -> PresignedUpload:
        """Store a new upload; twice changes nothing. Raises QuotaExceeded."""
        fixed = msgspec.json.encode(upload)
        args: list[bytes | str | int] = [upload.id, fixed, self._max_pending, LIFE_SECONDS, KEPT_SECONDS]
        with store_errors():
            created = await self._create(keys=_keys(upload.tenant, upload.id), args=args)
        if not created:
            raise QuotaExceeded(f"A tenant may have {self._max_pending} uploads open at a time.")
        return await self.get(upload.tenant, upload.id)

    async def get(self, tenant: str, id_: str) -> PresignedUpload:
        """The upload as it is now. Raises NotFound."""
        with store_errors():
            record = await self._redis.hgetall(_keys(tenant, id_)[0]) if id_.isidentifier() else {}
            now, _ = await self._redis.time()
        if not record:
            raise NotFound(f"There is no upload {shown(id_)}.", param="upload_id")
        fields = {text(name): text(value) for name, value in record.items()}
        expires, status = int(fields["expires"]), fields["status"]
        return msgspec.structs.replace(
            msgspec.json.decode(fields["fixed"], type=PresignedUpload),
            expires=expires,
            status="expired" if status == "pending" and expires <= int(now) else status,
            asked=fields.get("asked", ""),
            first=int(fields.get("first", 0)),
            version=int(fields.get("version") or 0),
            now=int(now),
        )

    async def claim(self, upload: PresignedUpload, token: str, first: int) -> PresignedUpload:
        """Take or renew the claim of `token`. `first` is stored by the first claim. Raises Conflict."""
        answer = await self._run(self._claim, upload, token, CLAIM_SECONDS, first)
        if answer == "busy":
            raise Conflict(f"The upload {shown(upload.id)} is being completed; try again.", param="upload_id")
        if answer != "claimed":
            raise ended(upload.id, answer)
        return await self.get(upload.tenant, upload.id)

    async def release(self, upload: PresignedUpload, token: str) -> None:
        """End the claim of `token`; the upload stays pending."""
        await self._run(self._release, upload, token)

    async def complete(self, upload: PresignedUpload, version: int, asked: str) -> None:
        """Record that it was published as `version` by the request `asked`."""
        await self._run(self._finish, upload, upload.id, "completed", version, asked, CLAIM_SECONDS)

    async def cancel(self, upload: PresignedUpload) -> None:
        """Raises Conflict if it is completed, expired or being completed."""
        answer = "expired" if upload.status == "expired" else "busy"
        if upload.status != "expired":
            answer = await self._run(self._finish, upload, upload.id, "cancelled", 0, "", CLAIM_SECONDS)
        if answer != "cancelled":
            raise ended(upload.id, "being completed" if answer == "busy" else answer)

    async def _run(self, script: AsyncScript, upload: PresignedUpload, *args: str | int) -> str:
        with store_errors():
            answer = await script(keys=_keys(upload.tenant, upload.id), args=list(args))
        return text(answer)


def new_id() -> str:
    return f"adup_{secrets.token_hex(12)}"


def ended(id_: str, status: str) -> Conflict:
    return Conflict(f"The upload {shown(id_)} is {status}.", param="upload_id")


def _keys(tenant: str, id_: str) -> list[str]:
    return [f"pp:direct:{tenant}:{id_}", f"pp:directs:{tenant}"]
