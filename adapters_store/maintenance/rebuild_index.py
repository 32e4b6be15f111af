"""Makes the index say what manifests and marks in the object store say. For a lost or damaged index.

Aliases, pins and history are in no manifest: they stay as far as they are there.
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

    def __init__(self, objects: Objects, index: Index, leftovers: DeletionReconciler) -> None:
        self._objects = objects
        self._index = index
        self._leftovers = leftovers

    async def run(self) -> int:
        """How many versions there are, deleted ones included."""
        await self._leftovers.settle()
        stored = set(await self._objects.list(names.TENANTS))
        places = [place for key in sorted(stored) if (place := names.parse_manifest_key(key))]
        found = 0
        for start in range(0, len(places), MAX_CONCURRENT):
            page = places[start : start + MAX_CONCURRENT]
            found += sum(await asyncio.gather(*(self._learn(place, stored) for place in page)))
        for deleted in (False, True):
            for tenant in await self._index.tenants(deleted=deleted):
                await self._forget_missing(tenant, stored, deleted=deleted)
        await self._leftovers.settle()
        await self._index.forget_bytes()
        return found

    async def _learn(self, place: ManifestKey, stored: set[str]) -> bool:
        """Whether a version is there now. One whose blobs are gone is none: its upload took too long."""
        try:
            manifest = decode_manifest(await self._objects.get(names.manifest_key(*place)))
        except NotFound:
            return False
        except msgspec.MsgspecError:
            log.error("A manifest cannot be read and is left out: %s", names.manifest_key(*place))
            return False
        if (manifest.tenant, manifest.name, manifest.version) != place or not await self._whole(
            manifest, stored
        ):
            log.error("A manifest is left out, what it names is not there: %s", names.manifest_key(*place))
            return False
        mark = names.deleted_key(*place)
        if mark in stored and (deleted := await self._deleted(mark)) is not None:
            await self._index.add_gone(Gone(deleted, summary(manifest)))
            return True
        blobs = [blob.key for blob in manifest.files]
        await self._index.add(
            summary(manifest), blobs, "server", new=False, max_adapters=NO_QUOTA, max_bytes=NO_QUOTA
        )
        if not await self._exists(names.manifest_key(*place)):  # purged while we looked
            await self._index.remove(place.tenant, place.name, place.version, "server", purge=True)
            return False
        return True

    async def _whole(self, manifest: Manifest, stored: set[str]) -> bool:
        missing = [blob.key for blob in manifest.files if blob.key not in stored]
        return all([await self._exists(key) for key in missing])

    async def _deleted(self, mark: str) -> int | None:
        """When, in Unix ms. A mark that cannot be read still says that it is, though not since when."""
        try:
            data = await self._objects.get(mark)
            return msgspec.json.decode(data, type=dict[str, int])["deleted"]
        except NotFound:  # restored while we looked
            return None
        except (msgspec.MsgspecError, KeyError):
            return int((await self._objects.head(mark)).modified * 1000)

    async def _forget_missing(self, tenant: str, stored: set[str], *, deleted: bool) -> None:
        """Versions of which there is no manifest."""
        after = None
        while page := await self._index.names(tenant, after, PAGE_SIZE, deleted=deleted):
            after = page[-1]
            if deleted:
                gone = [
                    one.version for found in await self._index.deleted(tenant, page) for one in found.versions
                ]
            else:
                gone = [one for found in await self._index.adapters(tenant, page) for one in found.versions]
            for version in gone:
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
