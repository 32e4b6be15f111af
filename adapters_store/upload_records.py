"""Records, in Valkey, of uploads of any kind: pending until they are completed, cancelled or expired.

    {stem}s:{tenant}        zset    ids of pending uploads, by when they expire (Unix seconds)
    {stem}:{tenant}:{id}    hash    `fixed` (JSON), `status`, `expires`; `claim` and `claimed` (s) during an
                                    attempt to complete it, `first` since the first one; `asked` once it has
                                    ended; other fields of the kind's own. Gone a day after it expired

A kind whose completion takes long runs it under a claim, which expires after CLAIM_SECONDS unless it is
renewed; while one is valid, the upload cannot be cancelled. Each transition is one script, atomic and
idempotent. Times are Valkey's own. Knows neither bytes nor what an upload becomes.
"""

from typing import Any, Generic, Literal, TypeVar

import msgspec
from redis.asyncio import Redis
from redis.commands.core import AsyncScript

from adapters_store.valkey import store_errors, text
from server.errors import Conflict, NotFound, QuotaExceeded, shown

LIFE_SECONDS = 3600  # of a pending upload
KEPT_SECONDS = 24 * 3600  # after its expiry, so that a late caller learns its status
CLAIM_SECONDS = 30  # unless renewed
Status = Literal["pending", "completed", "cancelled", "expired"]

PRELUDE = """
local upload, pending = unpack(KEYS)
local id = ARGV[1]
local now = tonumber(redis.call('TIME')[1])
local function status()
  local stored = redis.call('HGET', upload, 'status')
  if stored == 'pending' and tonumber(redis.call('HGET', upload, 'expires')) <= now then return 'expired' end
  return stored
end
local function claimant(seconds)
  local holder, since = unpack(redis.call('HMGET', upload, 'claim', 'claimed'))
  return holder and tonumber(since) + seconds > now and holder
end
"""
CREATE = """
if redis.call('EXISTS', upload) == 1 then return 1 end
redis.call('ZREMRANGEBYSCORE', pending, '-inf', now)
if redis.call('ZCARD', pending) >= tonumber(ARGV[3]) then return 0 end
local expires = now + ARGV[4]
redis.call('HSET', upload, 'fixed', ARGV[2], 'status', 'pending', 'expires', expires, unpack(ARGV, 6))
redis.call('EXPIREAT', upload, expires + ARGV[5])
redis.call('ZADD', pending, expires, id)
return 1
"""
CLAIM = """
local current, holder = status(), claimant(ARGV[3])
if current ~= 'pending' then return current end
if holder and holder ~= ARGV[2] then return 'busy' end
redis.call('HSET', upload, 'claim', ARGV[2], 'claimed', now)
redis.call('HSETNX', upload, 'first', ARGV[4])
return 'claimed'
"""
RELEASE = """
if redis.call('HGET', upload, 'claim') == ARGV[2] then redis.call('HDEL', upload, 'claim', 'claimed') end
return 'released'
"""
# ARGV: id, new status, seconds of a claim, whether an expired upload may still end so, names and values of
# fields. The first field tells a call that is repeated, and answered as before, from another one.
FINISH = """
local new, name, value = ARGV[2], ARGV[5], ARGV[6]
local current = ARGV[4] == '1' and redis.call('HGET', upload, 'status') or status()
if current == new and redis.call('HGET', upload, name) ~= value then return 'another' end
if current ~= 'pending' then return current end
if new == 'cancelled' and claimant(ARGV[3]) then return 'busy' end
redis.call('HSET', upload, 'status', new, unpack(ARGV, 5))
redis.call('HDEL', upload, 'claim', 'claimed')
redis.call('ZREM', pending, id)
return new
"""


class UploadRecord(msgspec.Struct, frozen=True, kw_only=True):
    """What all kinds of uploads have. A kind adds fields; its `stored` reads those that change."""

    id: str
    tenant: str
    name: str
    created: int  # Unix seconds
    # fields of their own in the hash, because they change
    expires: int = 0
    status: Status = "pending"
    asked: str = ""  # once completed: the request that completed it

    @staticmethod
    def stored(fields: dict[str, str]) -> dict[str, Any]:
        """The kind's own fields that change, from those of the hash and `now`, Valkey's time."""
        raise NotImplementedError


R = TypeVar("R", bound=UploadRecord)


class UploadRecords(Generic[R]):
    """The uploads of one kind. All calls raise StoreError, and NotFound for an upload of another tenant."""

    def __init__(self, redis: Redis, stem: str, kind: type[R], max_pending: int) -> None:
        """`stem` begins the keys. A tenant may have `max_pending` uploads that are pending."""
        self._redis = redis
        self._stem = stem
        self._kind = kind
        self._max_pending = max_pending
        self._create, self._claim, self._release, self._finish = map(
            self.script, (CREATE, CLAIM, RELEASE, FINISH)
        )

    def script(self, lua: str) -> AsyncScript:
        """A script for `run`; it may use `upload`, `id`, `now` and `status()`, and ARGV from 2 on."""
        return self._redis.register_script(PRELUDE + lua)

    async def run(self, script: AsyncScript, tenant: str, id_: str, *args: bytes | str | int) -> str:
        with store_errors():
            return text(await script(keys=self._keys(tenant, id_), args=[id_, *args]))

    async def create(self, upload: R, **fields: int) -> R:
        """Store a new upload, and `fields` in its hash; twice changes nothing. Raises QuotaExceeded."""
        args = [self._max_pending, LIFE_SECONDS, KEPT_SECONDS, *_pairs(fields)]
        created = await self.run(self._create, upload.tenant, upload.id, msgspec.json.encode(upload), *args)
        if created != "1":
            raise QuotaExceeded(f"A tenant may have {self._max_pending} uploads open at a time.")
        return await self.get(upload.tenant, upload.id)

    async def get(self, tenant: str, id_: str) -> R:
        """The upload as it is now; a pending one that is past its time has the status "expired"."""
        with store_errors():
            found = await self._redis.hgetall(self._keys(tenant, id_)[0]) if id_.isidentifier() else {}
            now = int((await self._redis.time())[0])
        if not found:
            raise NotFound(f"There is no upload {shown(id_)}.", param="upload_id")
        fields = {text(name): text(value) for name, value in found.items()}
        expires, status = int(fields["expires"]), fields["status"]
        return msgspec.structs.replace(
            msgspec.json.decode(fields["fixed"], type=self._kind),
            expires=expires,
            status="expired" if status == "pending" and expires <= now else status,
            asked=fields.get("asked", ""),
            **self._kind.stored(fields | {"now": str(now)}),
        )

    async def claim(self, upload: R, token: str, first: int) -> R:
        """Take or renew the claim of `token`. `first` is stored by the first claim. Raises Conflict."""
        answer = await self.run(self._claim, upload.tenant, upload.id, token, CLAIM_SECONDS, first)
        if answer == "busy":
            raise Conflict(f"The upload {shown(upload.id)} is being completed; try again.", param="upload_id")
        if answer != "claimed":
            raise ended(upload.id, answer)
        return await self.get(upload.tenant, upload.id)

    async def release(self, upload: R, token: str) -> None:
        """End the claim of `token`; the upload stays pending."""
        await self.run(self._release, upload.tenant, upload.id, token)

    async def finish(self, upload: R, status: Status, *, late: bool = False, **fields: str | int) -> str:
        """End a pending upload and store `fields`, of which the first differs from that of any other call.

        Returns `status`, or why the call changed nothing: the status it has instead; "another" if it has this
        one by another call; "busy" if a claim forbids to cancel it. `late`: end it even if it has expired.
        """
        args = [status, CLAIM_SECONDS, int(late), *_pairs(fields)]
        return await self.run(self._finish, upload.tenant, upload.id, *args)

    def _keys(self, tenant: str, id_: str) -> list[str]:
        return [f"{self._stem}:{tenant}:{id_}", f"{self._stem}s:{tenant}"]


def ended(id_: str, status: str) -> Conflict:
    return Conflict(f"The upload {shown(id_)} is {status}.", param="upload_id")


def _pairs(fields: dict[str, Any]) -> list[Any]:
    return [part for pair in fields.items() for part in pair]
