"""Multipart uploads of files: parts come in any order and over several connections, and one call joins them.

pp:uploads:{tenant}, pp:upload:{tenant}:{id}    see upload_records.py; `bytes` of all parts, `file` once it
                                                is completed, and a `part-...` (JSON) for each
tenants/{tenant}/uploads/{id}/{part}            a part's bytes, scheduled for deletion from the start
"""

import hashlib
import secrets
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
from anyio.to_thread import run_sync
from redis.asyncio import Redis

from adapters_store.names import TENANTS
from adapters_store.object_store.store import Objects
from adapters_store.upload_records import LIFE_SECONDS, Status, UploadRecord, UploadRecords, ended
from server.errors import InvalidField, NotFound, shown
from server.files.files import File, FileStore, Purpose, check_file_name

GRACE_SECONDS = 600  # for parts that are still being written when the upload ends
MAX_PARTS = 1000
PART_PREFIX = "part-"

ADD_PART = """
local part, record, size = ARGV[2], ARGV[3], tonumber(ARGV[4])
local found = status()
if found ~= 'pending' then return found end
if redis.call('HEXISTS', upload, part) == 1 then return 'done' end
local bytes = redis.call('HGET', upload, 'bytes') + size
if bytes > tonumber(ARGV[5]) then return 'bytes' end
if redis.call('HLEN', upload) >= tonumber(ARGV[6]) then return 'parts' end
redis.call('HSET', upload, part, record, 'bytes', bytes)
return 'done'
"""


class Part(msgspec.Struct, frozen=True, kw_only=True):
    """A stored part of an upload."""

    id: str  # part-...
    bytes: int
    sha256: str
    created: int


class Upload(UploadRecord, frozen=True, kw_only=True):
    """An upload upload_... of the file `name`, with the parts that have come."""

    purpose: Purpose
    bytes: int  # declared size of the file
    life: int | None = None  # seconds until the file expires
    file: str | None = None
    parts: dict[str, Part] = msgspec.field(default_factory=dict)

    @staticmethod
    def stored(fields: dict[str, str]) -> dict[str, Any]:
        records = (record for name, record in fields.items() if name.startswith(PART_PREFIX))
        parts = [msgspec.json.decode(record, type=Part) for record in records]
        return {"file": fields.get("file") or None, "parts": {part.id: part for part in parts}}


class Uploads:
    """All calls raise StoreError, and NotFound for an unknown upload or another tenant's."""

    def __init__(
        self, redis: Redis, objects: Objects, files: FileStore, *, max_bytes: int, max_pending: int
    ) -> None:
        self._records = UploadRecords(redis, "pp:upload", Upload, max_pending)
        self._add_part = self._records.script(ADD_PART)
        self._objects = objects
        self._files = files
        self._max_bytes = max_bytes

    async def create(
        self, tenant: str, name: str, size: int, purpose: Purpose, life: int | None = None
    ) -> Upload:
        """Start an upload of `size` bytes, whose file will expire after `life` seconds.

        Raises InvalidField for name or size, QuotaExceeded.
        """
        check_file_name(name)
        if not 1 <= size <= self._max_bytes:
            raise InvalidField(f"bytes is {size}; a file may have 1 to {self._max_bytes}.", param="bytes")
        await self._files.check_quota(tenant, size)
        id_, now = f"upload_{secrets.token_hex(12)}", int(time.time())
        upload = Upload(id=id_, tenant=tenant, name=name, purpose=purpose, bytes=size, created=now, life=life)
        created = await self._records.create(upload, bytes=0)
        await self._files.scheduled_deletes.add([_prefix(upload)], LIFE_SECONDS + GRACE_SECONDS)
        return created

    async def get(self, tenant: str, id_: str) -> Upload:
        """The upload with its parts; a pending one that is past its time has the status "expired"."""
        return await self._records.get(tenant, id_)

    async def add_part(self, tenant: str, id_: str, path: Path, size: int, sha256: str) -> Part:
        """Store the `size` bytes at `path` as a part.

        Raises Conflict unless the upload is pending, InvalidField for too many bytes or parts.
        """
        upload = await self.get(tenant, id_)
        if upload.status != "pending":
            raise ended(id_, upload.status)
        part = Part(
            id=f"{PART_PREFIX}{secrets.token_hex(12)}", bytes=size, sha256=sha256, created=int(time.time())
        )
        key = _part_key(upload, part)
        await self._objects.put(key, path, sha256)
        record = msgspec.json.encode(part)
        # twice the declared size: a client sends a part again whose answer was lost
        answer = await self._records.run(
            self._add_part, tenant, id_, part.id, record, size, 2 * upload.bytes, MAX_PARTS
        )
        if answer == "done":
            return part
        await self._objects.delete(key)
        if answer == "bytes":
            raise InvalidField(
                f"The parts are more than twice the {upload.bytes} bytes of the upload.", param="data"
            )
        if answer == "parts":
            raise InvalidField(f"An upload may have about {MAX_PARTS} parts.", param="data")
        raise ended(id_, (await self.get(tenant, id_)).status)

    async def complete(
        self, tenant: str, id_: str, part_ids: list[str], md5: str | None, folder: Path
    ) -> tuple[Upload, File]:
        """Join the parts, in `folder`, and store them as a file. The same call again returns the same file.

        Raises InvalidField if size or MD5 differ from the declared ones, Conflict unless the upload is
        pending.
        """
        request = hashlib.sha256(msgspec.json.encode([part_ids, md5])).hexdigest()
        upload = await self.get(tenant, id_)
        if upload.status != "pending":
            return await self._completed(upload, request)
        joined = folder / "whole"
        try:
            sha256 = await self._join(upload, _chosen(upload, part_ids), md5, joined)
        except NotFound:  # the parts are gone: another call has ended the upload
            return await self._completed(await self.get(tenant, id_), request)
        file = await self._files.add(
            tenant,
            joined,
            upload.name,
            sha256,
            size=upload.bytes,
            purpose=upload.purpose,
            life=upload.life,
        )
        if await self._end(upload, "completed", file.id, request):
            return await self.get(tenant, id_), file
        await self._files.delete(tenant, file.id)
        return await self._completed(await self.get(tenant, id_), request)

    async def cancel(self, tenant: str, id_: str) -> Upload:
        """Cancel a pending upload. Raises Conflict for one that is completed or expired."""
        upload = await self.get(tenant, id_)
        if upload.status == "pending":
            await self._end(upload, "cancelled")
            upload = await self.get(tenant, id_)
        if upload.status != "cancelled":
            raise ended(id_, upload.status)
        return upload

    async def _completed(self, upload: Upload, request: str) -> tuple[Upload, File]:
        """The result of an upload that the same `request` has completed. Raises Conflict for all others."""
        if upload.status != "completed" or upload.file is None or upload.asked != request:
            raise ended(upload.id, upload.status)
        return upload, await self._files.get(upload.tenant, upload.file)

    async def _join(self, upload: Upload, parts: list[Part], md5: str | None, joined: Path) -> str:
        """Write the parts to `joined`, one after the other; returns the SHA-256 of all.

        Raises InvalidField if the MD5 is not `md5`.
        """
        sha256, check = hashlib.sha256(), hashlib.md5(usedforsecurity=False)
        downloaded = joined.with_name("part")
        for part in parts:
            await self._objects.download(_part_key(upload, part), downloaded, part.sha256)
            await run_sync(_append, downloaded, joined, (sha256.update, check.update))
        if md5 is not None and md5.lower() != check.hexdigest():
            raise InvalidField(
                f"md5 is {shown(md5)}, but the parts together have {check.hexdigest()}.", param="md5"
            )
        return sha256.hexdigest()

    async def _end(self, upload: Upload, status: Status, file: str = "", request: str = "") -> bool:
        """End a pending upload and schedule its parts for deletion. False if it had ended otherwise."""
        answer = await self._records.finish(upload, status, file=file, asked=request)
        await self._files.scheduled_deletes.discard(_prefix(upload), GRACE_SECONDS)
        return answer == status


def _chosen(upload: Upload, part_ids: list[str]) -> list[Part]:
    """The parts by their ids, in this order. Raises InvalidField unless they add up to the declared size."""
    for number, part_id in enumerate(part_ids):
        if part_id not in upload.parts:
            raise InvalidField(
                f"part_ids[{number}] is {shown(part_id)}, which is no part of this upload.", param="part_ids"
            )
    if len(set(part_ids)) < len(part_ids):
        raise InvalidField("part_ids names a part twice.", param="part_ids")
    parts = [upload.parts[part_id] for part_id in part_ids]
    size = sum(part.bytes for part in parts)
    if size != upload.bytes:
        raise InvalidField(
            f"The parts have {size} bytes together, but the upload was announced with {upload.bytes}.",
            param="part_ids",
        )
    return parts


def _append(source: Path, target: Path, sinks: tuple[Callable[[bytes], object], ...]) -> None:
    with source.open("rb") as part, target.open("ab") as joined:
        while chunk := part.read(1 << 20):
            joined.write(chunk)
            for sink in sinks:
                sink(chunk)


def _prefix(upload: Upload) -> str:
    return f"{TENANTS}/{upload.tenant}/uploads/{upload.id}/"


def _part_key(upload: Upload, part: Part) -> str:
    return _prefix(upload) + part.id
