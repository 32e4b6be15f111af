"""Rebuilds a lost or damaged index from the manifests and deletion marks in the object store.

Aliases, pins and history are in no manifest: the index keeps those that it still has.
"""

import asyncio
import logging

import msgspec

from adapters_store import names
from adapters_store.index.index import Index
from adapters_store.index.records import Gone, summary
from adapters_store.maintenance.deletions import DeletionReconciler
from adapters_store.manifest import Manifest, decode_manifest
from adapters_store.names import ManifestKey
from adapters_store.object_store.store import Objects
from server.errors import NotFound

NO_QUOTA = 2**53
MAX_CONCURRENT = 64
PAGE_SIZE = 100
log = logging.getLogger(__name__)


class IndexRebuild:
    """All calls raise StoreError."""

    def __init__(self, objects: Objects, index: Index, deletions: DeletionReconciler) -> None:
        self._objects = objects
        self._index = index
        self._deletions = deletions

    async def run(self) -> int:
        """Rebuild; returns the number of versions, deleted ones included."""
        await self._deletions.reconcile()
        stored = set(await self._objects.list(names.TENANTS))
        keys = [key for path in sorted(stored) if (key := names.parse_manifest_key(path))]
        found = 0
        for start in range(0, len(keys), MAX_CONCURRENT):
            page = keys[start : start + MAX_CONCURRENT]
            found += sum(await asyncio.gather(*(self._add(key, stored) for key in page)))
        for deleted in (False, True):
            for tenant in await self._index.tenants(deleted=deleted):
                await self._forget_missing(tenant, stored, deleted=deleted)
        await self._deletions.reconcile()
        await self._index.forget_bytes()
        return found

    async def _add(self, key: ManifestKey, stored: set[str]) -> bool:
        """Add the version to the index; False if it does not exist, or its blobs were collected already."""
        try:
            manifest = decode_manifest(await self._objects.get(names.manifest_key(*key)))
        except NotFound:
            return False
        except msgspec.MsgspecError:
            log.error("A manifest cannot be read and is left out: %s", names.manifest_key(*key))
            return False
        matches = (manifest.tenant, manifest.name, manifest.version) == key
        if not matches or not await self._complete(manifest, stored):
            log.error("A manifest is left out, what it names is not there: %s", names.manifest_key(*key))
            return False
        mark = names.deleted_key(*key)
        if mark in stored and (deleted := await self._deleted_at(mark)) is not None:
            await self._index.add_gone(Gone(deleted, summary(manifest)))
            return True
        blobs = [blob.key for blob in manifest.files]
        await self._index.add(
            summary(manifest), blobs, "server", new=False, max_adapters=NO_QUOTA, max_bytes=NO_QUOTA
        )
        if not await self._exists(names.manifest_key(*key)):  # purged while we looked
            await self._index.remove(key.tenant, key.name, key.version, "server", purge=True)
            return False
        return True

    async def _complete(self, manifest: Manifest, stored: set[str]) -> bool:
        """Whether every blob exists. `stored` was listed earlier, so blobs not in it are looked up again."""
        missing = [blob.key for blob in manifest.files if blob.key not in stored]
        return all([await self._exists(key) for key in missing])

    async def _deleted_at(self, mark: str) -> int | None:
        """Deletion time in Unix ms; that of the mark itself if its content cannot be read; None: restored."""
        try:
            data = await self._objects.get(mark)
            return msgspec.json.decode(data, type=dict[str, int])["deleted"]
        except NotFound:  # restored while we looked
            return None
        except (msgspec.MsgspecError, KeyError):
            return int((await self._objects.head(mark)).modified * 1000)

    async def _forget_missing(self, tenant: str, stored: set[str], *, deleted: bool) -> None:
        """Remove versions without a manifest from the index."""
        after = None
        while page := await self._index.names(tenant, after, PAGE_SIZE, deleted=deleted):
            after = page[-1]
            if deleted:
                adapters = await self._index.deleted(tenant, page)
                versions = [gone.version for adapter in adapters for gone in adapter.versions]
            else:
                live = await self._index.adapters(tenant, page)
                versions = [version for adapter in live for version in adapter.versions]
            for version in versions:
                key = version.manifest_key
                if key in stored or await self._exists(key):
                    continue
                if deleted:
                    await self._index.purge(tenant, version.name, version.version, "server")
                else:
                    await self._index.remove(tenant, version.name, version.version, "server", purge=True)

    async def _exists(self, key: str) -> bool:
        try:
            await self._objects.head(key)
        except NotFound:
            return False
        return True
