"""Tenants' files: records in Valkey, bytes in the object store. Their content is not looked at.

    pp:files:{tenant}          hash     file id -> File (JSON)
    pp:files:{tenant}:bytes    string   total size of the tenant's files
    pp:files:expiring          zset     {tenant}/{file} by when it expires (Unix seconds)
    tenants/{tenant}/files/{file}       object with the bytes

A file exists once its record does. Before its bytes are written they are scheduled for deletion; the script
that adds the record cancels that, so a crash leaves no bytes behind. A file that has expired is hidden at
once and deleted by the next cleanup that finds no unfinished job of it; until then that job can read it.
"""

import secrets
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Literal

import msgspec
from redis.asyncio import Redis

from adapters_store.maintenance.scheduled_deletes import SCHEDULED_KEY, ScheduledDeletes
from adapters_store.names import TENANTS, is_file_name
from adapters_store.object_store.store import Objects
from adapters_store.valkey import store_errors, text
from server.errors import InvalidField, NotFound, QuotaExceeded, shown
from server.tenancy.limits import LimitsOf, unlimited

Purpose = Literal["fine-tune", "fine-tune-results"]
MAX_NAME_LENGTH = 255
WRITE_SECONDS = 3600  # the longest time that writing a file may take
NO_LIMIT = 2**53
EXPIRING_KEY = "pp:files:expiring"
MAX_EXPIRED = 100  # deleted in one go

ADD = """
local files, total, deletes = unpack(KEYS)
local id, record, size, key = ARGV[1], ARGV[2], tonumber(ARGV[3]), ARGV[4]
if redis.call('HEXISTS', files, id) == 0 then
  if redis.call('HLEN', files) >= tonumber(ARGV[5]) then return 'files' end
  if tonumber(redis.call('GET', total) or 0) + size > tonumber(ARGV[6]) then return 'bytes' end
  redis.call('HSET', files, id, record)
  redis.call('INCRBY', total, size)
end
redis.call('ZREM', deletes, key)
return 'done'
"""

REMOVE = """
local files, total, deletes = unpack(KEYS)
local id, size, key = ARGV[1], ARGV[2], ARGV[3]
if redis.call('HDEL', files, id) == 0 then return 0 end
redis.call('DECRBY', total, size)
redis.call('ZADD', deletes, 0, key)
return 1
"""


class File(msgspec.Struct, frozen=True, kw_only=True):
    """A file's record."""

    id: str  # file-...
    tenant: str
    name: str  # given by the tenant; for display only
    purpose: Purpose
    bytes: int
    sha256: str
    created: int  # Unix seconds
    expires: int | None = None

    @property
    def expired(self) -> bool:
        return self.expires is not None and self.expires <= time.time()

    @property
    def key(self) -> str:
        return file_key(self.tenant, self.id)


class FileStore:
    """All calls raise StoreError when Valkey or the object store does not answer."""

    def __init__(
        self,
        redis: Redis,
        objects: Objects,
        *,
        max_files: int = NO_LIMIT,
        limits_of: LimitsOf = unlimited,
    ) -> None:
        self.scheduled_deletes = ScheduledDeletes(redis, objects)
        self._redis = redis
        self._objects = objects
        self._max_files = max_files
        self._limits_of = limits_of
        self._add = redis.register_script(ADD)
        self._remove = redis.register_script(REMOVE)

    async def add(
        self,
        tenant: str,
        path: Path,
        name: str,
        sha256: str,
        *,
        size: int,
        purpose: Purpose,
        id_: str | None = None,
        life: int | None = None,
    ) -> File:
        """Store the `size` bytes at `path` as a file, which expires after `life` seconds. If `id_` exists
        already, return that file unchanged.

        Raises InvalidField for the name, QuotaExceeded above the tenant's limits. Result files count towards
        these but are never refused.
        """
        id_, now = id_ or new_id(), int(time.time())
        check_file_name(name)
        file = File(
            id=id_,
            tenant=tenant,
            name=name,
            purpose=purpose,
            bytes=size,
            sha256=sha256,
            created=now,
            expires=life and now + life,
        )
        await self.scheduled_deletes.add([file.key], WRITE_SECONDS)
        await self._objects.put(file.key, path, sha256)
        max_bytes = await self._max_bytes(tenant)
        caps = (self._max_files, max_bytes) if purpose == "fine-tune" else (NO_LIMIT, NO_LIMIT)
        with store_errors():
            if file.expires is not None:  # before the record: an entry without a file does no harm
                await self._redis.zadd(EXPIRING_KEY, {f"{tenant}/{id_}": file.expires})
            answer = await self._add(
                keys=[*_keys(tenant), SCHEDULED_KEY],
                args=[id_, msgspec.json.encode(file), size, file.key, *caps],
            )
        if answer != b"done":
            await self.scheduled_deletes.discard(file.key)
            raise self._quota(answer, max_bytes)
        return await self.get(tenant, id_)

    async def get(self, tenant: str, id_: str, *, expired: bool = False) -> File:
        """Raises NotFound, the same for an unknown file and another tenant's; also for one that has expired,
        unless `expired`.
        """
        with store_errors():
            record = await self._redis.hget(_keys(tenant)[0], id_)
        file = msgspec.json.decode(record, type=File) if record is not None else None
        if file is None or (file.expired and not expired):
            raise NotFound(f"There is no file {shown(id_)}.", param="file_id")
        return file

    async def list(self, tenant: str) -> list[File]:
        """All files of the tenant, the newest first."""
        with store_errors():
            records = await self._redis.hvals(_keys(tenant)[0])
        files = [msgspec.json.decode(record, type=File) for record in records]
        files = [file for file in files if not file.expired]
        return sorted(files, key=lambda file: (-file.created, file.id))

    async def check_quota(self, tenant: str, size: int) -> None:
        """Raise QuotaExceeded if a file of `size` bytes would not fit now; for a check before its upload."""
        files, total = _keys(tenant)
        with store_errors():
            count, used = await self._redis.hlen(files), int(await self._redis.get(total) or 0)
        max_bytes = await self._max_bytes(tenant)
        if count >= self._max_files:
            raise self._quota(b"files", max_bytes)
        if used + size > max_bytes:
            raise self._quota(b"bytes", max_bytes)

    async def download(self, file: File, path: Path) -> None:
        """Download the bytes to `path` and verify them. Raises NotFound if the file was deleted meanwhile."""
        await self._objects.download(file.key, path, file.sha256)

    async def delete(self, tenant: str, id_: str) -> None:
        """Delete the record, and with it the file; the bytes follow, also after a crash. Raises NotFound."""
        file = await self.get(tenant, id_, expired=True)
        with store_errors():
            removed = await self._remove(
                keys=[*_keys(tenant), SCHEDULED_KEY], args=[id_, file.bytes, file.key]
            )
        if removed:
            await self.scheduled_deletes.discard(file.key)

    async def delete_expired(self, needed: Callable[[str], Awaitable[set[str]]]) -> int:
        """Delete files that have expired, but those whose ids `needed(tenant)` has: how many."""
        deleted = 0
        with store_errors():
            due = await self._redis.zrange(
                EXPIRING_KEY, "-inf", int(time.time()), byscore=True, offset=0, num=MAX_EXPIRED
            )
        for entry in map(text, due):
            tenant, _, id_ = entry.partition("/")
            if id_ in await needed(tenant):
                continue
            with suppress(NotFound):  # the tenant was faster
                await self.delete(tenant, id_)
                deleted += 1
            with store_errors():
                await self._redis.zrem(EXPIRING_KEY, entry)
        return deleted

    async def _max_bytes(self, tenant: str) -> int:
        limit = (await self._limits_of(tenant)).file_bytes
        return NO_LIMIT if limit is None else limit

    def _quota(self, which: bytes, max_bytes: int) -> QuotaExceeded:
        limit = f"{self._max_files} files" if which == b"files" else f"{max_bytes} bytes in files"
        return QuotaExceeded(f"A tenant may have {limit}; delete some first.", param="file")


def new_id() -> str:
    return f"file-{secrets.token_hex(12)}"


def file_key(tenant: str, id_: str) -> str:
    return f"{TENANTS}/{tenant}/files/{id_}"


def check_file_name(name: str) -> str:
    """The name, if it is short, printable and without a path. Raises InvalidField."""
    if not is_file_name(name, MAX_NAME_LENGTH):
        raise InvalidField(
            f"filename {shown(name)} must be 1 to {MAX_NAME_LENGTH} characters without a path.",
            param="filename",
        )
    return name


def _keys(tenant: str) -> tuple[str, str]:
    return f"pp:files:{tenant}", f"pp:files:{tenant}:bytes"
