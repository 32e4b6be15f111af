"""Garbage: blobs of uploads that came to nothing. Takes none that a manifest names, whatever runs beside it.

First a blob is declared nobody's (blob_leases.py): from then on no version of it can come. Then the manifests
are read; one that names it was there before. What none names is removed. Whoever dies in between leaves a
blob that the next one finds.
"""

import asyncio
import logging
import time
from collections.abc import Iterable
from typing import NamedTuple

import msgspec

from adapters_store import names
from adapters_store.maintenance.blob_leases import BlobLeases
from adapters_store.manifest import decode_manifest
from adapters_store.object_store.store import Objects
from server.errors import NotFound

MAX_CONCURRENT = 32
log = logging.getLogger(__name__)


class Collected(NamedTuple):
    keys: list[str]
    bytes: int
    unreadable: list[str]  # tenants of whom nothing is removed: a manifest could hold any name


class Collector:
    """All calls raise StoreError."""

    def __init__(self, objects: Objects, staged: BlobLeases, grace_seconds: float) -> None:
        self._objects = objects
        self._staged = staged
        self._grace = grace_seconds

    async def collect(self, *, dry_run: bool = False) -> Collected:
        """Look at every blob in the store."""
        keys = await self._objects.list(names.TENANTS)
        return await self._collect([key for key in keys if names.blob_tenant(key)], dry_run=dry_run)

    async def discard(self, keys: list[str]) -> None:
        """At once what an upload that was refused has stored: many of them would fill the store."""
        given = await self._staged.give_up(keys)
        for key in given:
            await self._objects.delete(key)
        await self._staged.forget(given)

    async def collect_expired(self) -> Collected:
        """Only at blobs of uploads that were begun too long ago. Costs nothing where there are none."""
        return await self._collect(await self._staged.expired(), dry_run=False)

    async def _collect(self, keys: list[str], *, dry_run: bool) -> Collected:
        done = Collected([], 0, [])
        by_tenant: dict[str, list[str]] = {}
        for key in keys:
            by_tenant.setdefault(names.blob_tenant(key) or "", []).append(key)
        for tenant, blobs in by_tenant.items():
            nobodys = await self._staged.condemn(blobs, dry_run=dry_run)
            try:
                named = await self._named(tenant) if nobodys else set()
            except msgspec.MsgspecError:
                log.error("A manifest of tenant %s cannot be read: nothing of it is collected", tenant)
                done.unreadable.append(tenant)
                continue
            removed, size = await self._remove(set(nobodys) - named, dry_run=dry_run)
            if not dry_run:
                await self._staged.forget([*removed, *(named & set(nobodys))])
            done = Collected(done.keys + removed, done.bytes + size, done.unreadable)
        return done

    async def _named(self, tenant: str) -> set[str]:
        """Every blob that a manifest of the tenant names. Raises MsgspecError."""
        keys = await self._objects.list(f"{names.TENANTS}/{tenant}/adapters")
        found: set[str] = set()
        for start in range(0, len(keys), MAX_CONCURRENT):
            page = await asyncio.gather(*(self._blobs(key) for key in keys[start : start + MAX_CONCURRENT]))
            found = found.union(*page)
        return found

    async def _blobs(self, manifest_key: str) -> set[str]:
        try:
            manifest = decode_manifest(await self._objects.get(manifest_key))
        except NotFound:  # purged since
            return set()
        return {blob.key for blob in manifest.files}

    async def _remove(self, keys: Iterable[str], *, dry_run: bool) -> tuple[list[str], int]:
        """Those older than the grace period, and what they took."""
        removed, size, before = [], 0, time.time() - self._grace
        for key in sorted(keys):
            try:
                head = await self._objects.head(key)
            except NotFound:  # its upload died before it, or another collector was faster
                head = None
            if head is not None and head.modified > before:
                continue
            if head is not None and not dry_run:
                await self._objects.delete(key)
            removed.append(key)
            size += head.bytes if head else 0
        return removed, size
