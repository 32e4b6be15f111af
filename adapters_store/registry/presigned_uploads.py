"""Uploads whose bytes go from the client to the object store, past this server: their records, in Valkey.

    pp:directs:{tenant}          zset    pending uploads, by when they expire (s)
    pp:direct:{tenant}:{id}      hash    `fixed` (JSON), `status`, `expires`; `first` once one tried to
                                         complete it, `claim` and `claimed` (s) while one does;
                                         then `version`, `asked`
    tenants/{tenant}/direct/{id}/{number}    the bytes, doomed from the beginning

An upload is pending until it is completed, cancelled or expired. One caller at a time completes it; who died
at that is followed by the next after CLAIM_SECONDS, who knows by `first`, the version that was to come, where
to look for what his predecessor may have published. Each change is one script, and twice is as good as once.
Time is Valkey's own. Knows no URL and no adapter.
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
KEPT_SECONDS = 24 * 3600  # after that, so that a late caller is told what became of it
CLAIM_SECONDS = 30  # whoever completes it renews his claim
Status = Literal["pending", "completed", "cancelled", "expired"]

PRELUDE = """
local upload, pending = unpack(KEYS)
local now = tonumber(redis.call('TIME')[1])
local function status()
  local found = redis.call('HGET', upload, 'status')
  if found == 'pending' and tonumber(redis.call('HGET', upload, 'expires')) <= now then return 'expired' end
  return found
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
local found = status()
if found ~= 'pending' then return found end
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
local found, since = unpack(redis.call('HMGET', upload, 'status', 'claimed'))
if ARGV[2] == 'cancelled' and since and tonumber(since) + ARGV[5] > now then return 'busy' end
if found == 'pending' then
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
    name: str  # of the adapter to be
    files: list[AnnouncedFile]
    create_only: bool = False
    allow_noop: bool = False
    created: int  # Unix seconds
    # what changes
    expires: int = 0
    status: Status = "pending"
    asked: str = ""  # of a completed one: what completed it
    first: int = 0  # the lowest version that it can have become; 0: nobody has tried to complete it
    version: int = 0  # of a completed one
    now: int = 0  # when this was read

    @property
    def prefix(self) -> str:
        return f"{TENANTS}/{self.tenant}/direct/{self.id}/"

    def key(self, number: int) -> str:
        """Where the bytes of its files[number] lie; the tenant's words are no part of it."""
        return f"{self.prefix}{number}"


class PresignedUploads:
    """All calls raise StoreError; with an upload of nobody or of another tenant, all raise NotFound."""

    def __init__(self, redis: Redis, max_pending: int) -> None:
        self._redis = redis
        self._max_pending = max_pending
        scripts = (CREATE, CLAIM, RELEASE, FINISH)
        self._create, self._claim, self._release, self._finish = (
            redis.register_script(PRELUDE + script) for script in scripts
        )

    async def create(self, upload: PresignedUpload) -> PresignedUpload:
        """Raises QuotaExceeded."""
        fixed = msgspec.json.encode(upload)
        args: list[bytes | str | int] = [upload.id, fixed, self._max_pending, LIFE_SECONDS, KEPT_SECONDS]
        with store_errors():
            made = await self._create(keys=_keys(upload.tenant, upload.id), args=args)
        if not made:
            raise QuotaExceeded(f"A tenant may have {self._max_pending} uploads open at a time.")
        return await self.get(upload.tenant, upload.id)

    async def get(self, tenant: str, id_: str) -> PresignedUpload:
        with store_errors():
            found = await self._redis.hgetall(_keys(tenant, id_)[0]) if id_.isidentifier() else {}
            now, _ = await self._redis.time()
        if not found:
            raise NotFound(f"There is no upload {shown(id_)}.", param="upload_id")
        fields = {text(name): text(value) for name, value in found.items()}
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
        """Be, or stay, the one who completes it; `first` counts if nobody was before. Raises Conflict."""
        answer = await self._run(self._claim, upload, token, CLAIM_SECONDS, first)
        if answer == "busy":
            raise Conflict(f"The upload {shown(upload.id)} is being completed; try again.", param="upload_id")
        if answer != "claimed":
            raise ended(upload.id, answer)
        return await self.get(upload.tenant, upload.id)

    async def release(self, upload: PresignedUpload, token: str) -> None:
        await self._run(self._release, upload, token)

    async def complete(self, upload: PresignedUpload, version: int, asked: str) -> None:
        await self._run(self._finish, upload, upload.id, "completed", version, asked, CLAIM_SECONDS)

    async def cancel(self, upload: PresignedUpload) -> None:
        """Raises Conflict if it has ended otherwise, or is being completed."""
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
