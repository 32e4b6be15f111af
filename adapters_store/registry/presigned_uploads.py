"""Presigned uploads: the client sends an adapter's bytes directly to the object store.

    pp:directs:{tenant}, pp:direct:{tenant}:{id}    see upload_records.py; `version` once it is completed
    tenants/{tenant}/direct/{id}/{number}           the bytes, scheduled for removal from the beginning

Completion runs under a claim. `first` is the lowest version number that the first claimant could have
published, so that a later claimant can find a version that was published by one that died. Knows no URL.
"""

import secrets
from typing import Any

import msgspec
from redis.asyncio import Redis

from adapters_store.names import TENANTS
from adapters_store.upload_records import UploadRecord, UploadRecords, ended


class AnnouncedFile(msgspec.Struct, frozen=True):
    name: str
    bytes: int


class PresignedUpload(UploadRecord, frozen=True, kw_only=True):
    """An upload adup_... of the adapter `name`."""

    files: list[AnnouncedFile]
    create_only: bool = False
    allow_noop: bool = False
    first: int = 0  # the lowest version number it can have been published under; 0: never claimed
    version: int = 0  # once completed
    now: int = 0  # Valkey's time when this was read

    @staticmethod
    def stored(fields: dict[str, str]) -> dict[str, Any]:
        return {name: int(fields.get(name) or 0) for name in ("first", "version", "now")}

    @property
    def prefix(self) -> str:
        return f"{TENANTS}/{self.tenant}/direct/{self.id}/"

    def key(self, number: int) -> str:
        """Object key of files[number]; no text of the tenant's is part of it."""
        return f"{self.prefix}{number}"


class PresignedUploads(UploadRecords[PresignedUpload]):
    def __init__(self, redis: Redis, max_pending: int) -> None:
        super().__init__(redis, "pp:direct", PresignedUpload, max_pending)

    async def complete(self, upload: PresignedUpload, version: int, asked: str) -> None:
        """Record that it was published as `version` by the request `asked`, whose claim began in time."""
        await self.finish(upload, "completed", late=True, version=version, asked=asked)

    async def cancel(self, upload: PresignedUpload) -> None:
        """Raises Conflict if it is completed, expired or being completed."""
        answer = await self.finish(upload, "cancelled", version=0, asked="")
        if answer != "cancelled":
            raise ended(upload.id, "being completed" if answer == "busy" else answer)


def new_id() -> str:
    return f"adup_{secrets.token_hex(12)}"
