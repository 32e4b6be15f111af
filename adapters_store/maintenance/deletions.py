"""Makes the object store say what the index says of deleted versions, and takes away what is purged.

A deleted version keeps its manifest and blobs, and a mark beside them: an index that was lost learns from it
that the version is deleted. A purged one loses all three. Each move is a task in the index, `manifest#token`,
from the moment it is decided until the store is in line with it.
"""

import asyncio
import logging

import msgspec

from adapters_store import names
from adapters_store.index.index import Index, mark_of
from adapters_store.manifest import decode_manifest
from adapters_store.names import ManifestKey
from adapters_store.object_store.store import Objects
from server.errors import NotFound

MAX_CONCURRENT = 16
log = logging.getLogger(__name__)


class DeletionReconciler:
    """All calls raise StoreError."""

    def __init__(self, objects: Objects, index: Index) -> None:
        self._objects = objects
        self._index = index

    async def settle(self, prefix: str = "") -> None:
        """Do every task there is, or those under `prefix`. Of several who do, none is in another's way."""
        ahead = sorted(task for task in await self._index.deleting() if task.startswith(prefix))
        for start in range(0, len(ahead), MAX_CONCURRENT):
            await asyncio.gather(*map(self._settle, ahead[start : start + MAX_CONCURRENT]))

    async def _settle(self, member: str) -> None:
        """What the index says may change while the store is being told: the last word counts."""
        key = names.parse_manifest_key(member.partition("#")[0])
        if key is None:
            raise ValueError(f"not a task: {member!r}")
        while True:
            place, gone = await self._index.place(key)
            if place == "deleted" and gone is not None:
                await self._objects.put(*mark_of(gone))
            else:
                if place == "none":
                    await self._erase(key)
                await self._objects.delete(names.deleted_key(*key))
            if await self._index.settled(key, place, member):
                return

    async def _erase(self, key: ManifestKey) -> None:
        """Blobs first, no other version's: while the manifest is there, whoever comes next knows them."""
        path = names.manifest_key(*key)
        try:
            manifest = decode_manifest(await self._objects.get(path))
        except NotFound:
            return
        except msgspec.MsgspecError:
            log.warning("A purged manifest cannot be read; its blobs stay for the next collection: %s", path)
        else:
            for blob in manifest.files:
                if names.blob_tenant(blob.key) == key.tenant:
                    await self._objects.delete(blob.key)
        await self._objects.delete(path)
