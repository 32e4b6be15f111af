"""Carries out in the object store what the index has decided about deleted, purged and restored versions.

A deleted version keeps its manifest and blobs and gains a mark beside them, from which a rebuilt index learns
of the deletion. A purged version loses all three. Each decision leaves a task in the index, `manifest#token`,
until the store agrees with the index.
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

    async def reconcile(self, prefix: str = "") -> None:
        """Finish every task whose manifest is under `prefix`. Several processes may do so at once."""
        tasks = sorted(task for task in await self._index.deletion_tasks() if task.startswith(prefix))
        for start in range(0, len(tasks), MAX_CONCURRENT):
            await asyncio.gather(*map(self._finish, tasks[start : start + MAX_CONCURRENT]))

    async def _finish(self, task: str) -> None:
        """Repeats while the index changes the version's state meanwhile: the latest state counts."""
        key = names.parse_manifest_key(task.partition("#")[0])
        if key is None:
            raise ValueError(f"not a task: {task!r}")
        while True:
            state, gone = await self._index.state_of(key)
            if state == "deleted" and gone is not None:
                await self._objects.put(*mark_of(gone))
            else:
                if state == "none":
                    await self._erase(key)
                await self._objects.delete(names.deleted_key(*key))
            if await self._index.finish_task(key, state, task):
                return

    async def _erase(self, key: ManifestKey) -> None:
        """Remove the version's own blobs, then its manifest, which tells a later attempt what is left."""
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
