"""Garbage collection of the blobs of failed uploads. Safe beside running uploads and other collectors.

1. Expired leases are released (blob_leases.py): no new version can name these blobs.
2. The tenant's manifests are read: any version that names one of them was published before.
3. Blobs that no manifest names are removed.

A collector that is killed leaves blobs, which the next one finds.
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
from server.errors import NotFound, StoreError

MAX_CONCURRENT = 32
log = logging.getLogger(__name__)


class Collected(NamedTuple):
    keys: list[str]
    bytes: int
    unreadable: list[str]  # tenants with a manifest that cannot be read: it could name any of their blobs


class Collector:
    """All calls but `discard` raise StoreError."""

    def __init__(self, objects: Objects, leases: BlobLeases, grace_seconds: float) -> None:
        self._objects = objects
        self._leases = leases
        self._grace = grace_seconds

    async def collect(self, *, dry_run: bool = False) -> Collected:
        """Check every blob in the store. `dry_run` removes nothing."""
        keys = await self._objects.list(names.TENANTS)
        return await self._collect([key for key in keys if names.blob_tenant(key)], dry_run=dry_run)

    async def discard(self, keys: list[str]) -> None:
        """Remove the blobs of a refused upload at once: many refused uploads would fill the store.

        If the store does not answer, a later sweep does it.
        """
        try:
            released = await self._leases.release(keys)
            for key in released:
                await self._objects.delete(key)
            await self._leases.forget(released)
        except StoreError as error:
            log.warning("The bytes of a refused upload stay for a while: %s", error.message)

    async def sweep(self) -> Collected:
        """Check only blobs whose lease has expired. Costs one command where there are none."""
        return await self._collect(await self._leases.due(), dry_run=False)

    async def _collect(self, keys: list[str], *, dry_run: bool) -> Collected:
        done = Collected([], 0, [])
        by_tenant: dict[str, list[str]] = {}
        for key in keys:
            by_tenant.setdefault(names.blob_tenant(key) or "", []).append(key)
        for tenant, blobs in by_tenant.items():
            unleased = await self._leases.release_expired(blobs, dry_run=dry_run)
            try:
                named = await self._named(tenant) if unleased else set()
            except msgspec.MsgspecError:
                log.error("A manifest of tenant %s cannot be read: nothing of it is collected", tenant)
                done.unreadable.append(tenant)
                continue
            removed, size = await self._remove(set(unleased) - named, dry_run=dry_run)
            if not dry_run:
                await self._leases.forget([*removed, *(named & set(unleased))])
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
        """Remove those older than the grace period; their keys, and their size in bytes."""
        removed, size, before = [], 0, time.time() - self._grace
        for key in sorted(keys):
            try:
                head = await self._objects.head(key)
            except NotFound:  # never written, or another collector was faster
                head = None
            if head is not None and head.modified > before:
                continue
            if head is not None and not dry_run:
                await self._objects.delete(key)
            removed.append(key)
            size += head.bytes if head else 0
        return removed, size
