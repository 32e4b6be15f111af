"""Reads everything that versions are made of, and compares it with what it ought to be. Changes nothing."""

from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Literal, NamedTuple

import msgspec
from anyio.to_thread import run_sync

from adapters_store import names
from adapters_store.index.index import Index
from adapters_store.manifest import Manifest, decode_manifest
from adapters_store.names import ManifestKey
from adapters_store.object_store.store import Objects
from server.errors import CorruptObject, NotFound

PAGE_SIZE = 100
Kind = Literal["missing", "corrupt", "unindexed", "unreferenced"]
FAULTS: frozenset[Kind] = frozenset({"missing", "corrupt"})  # the others uploads leave that died


class Finding(NamedTuple):
    kind: Kind
    key: str
    version: str  # name@version it belongs to; "" of a blob that belongs to none

    @property
    def fault(self) -> bool:
        return self.kind in FAULTS


class Progress(NamedTuple):
    done: int  # objects looked at
    total: int
    findings: tuple[Finding, ...] = ()


class Verifier:
    """All calls raise StoreError: a store that does not answer is no finding."""

    def __init__(self, objects: Objects, index: Index) -> None:
        self._objects = objects
        self._index = index

    async def run(self, folder: Path) -> AsyncGenerator[Progress, None]:
        """A step for each manifest and blob; `folder` is for one blob at a time."""
        keys = set(await self._objects.list(names.TENANTS))
        places = [place for key in sorted(keys) if (place := names.parse_manifest_key(key))]
        blobs = {key for key in keys if names.blob_tenant(key)}
        total, done, named = len(places) + len(blobs), 0, set[str]()
        for finding in await self._lost(keys):
            yield Progress(done, total, (finding,))
        for place in places:
            manifest, findings = await self._manifest(place)
            done += 1
            yield Progress(done, total, findings)
            for blob in manifest.files if manifest else ():
                named.add(blob.key)
                findings = await self._blob(place, blob.key, blob.sha256, folder / "blob")
                done += blob.key in blobs
                yield Progress(done, total, findings)
        for key in sorted(blobs - named):
            done += 1
            yield Progress(done, total, (Finding("unreferenced", key, ""),))

    async def _lost(self, keys: set[str]) -> list[Finding]:
        """Versions that the index knows and the store does not."""
        found = []
        for deleted in (False, True):
            for tenant in await self._index.tenants(deleted=deleted):
                for key in await self._indexed(tenant, deleted=deleted):
                    if names.manifest_key(*key) not in keys and not await self._read(key):
                        place, _ = await self._index.place(key)  # purged while we looked?
                        if place != "none":
                            found.append(_finding("missing", names.manifest_key(*key), key))
        return found

    async def _indexed(self, tenant: str, *, deleted: bool) -> list[ManifestKey]:
        found, after = [], None
        while page := await self._index.names(tenant, after, PAGE_SIZE, deleted=deleted):
            after = page[-1]
            if deleted:
                gone = await self._index.deleted(tenant, page)
                versions = [one.version for adapter in gone for one in adapter.versions]
            else:
                live = await self._index.adapters(tenant, page)
                versions = [version for adapter in live for version in adapter.versions]
            found += [ManifestKey(tenant, version.name, version.version) for version in versions]
        return found

    async def _read(self, place: ManifestKey) -> bytes | None:
        try:
            return await self._objects.get(names.manifest_key(*place))
        except NotFound:
            return None

    async def _manifest(self, place: ManifestKey) -> tuple[Manifest | None, tuple[Finding, ...]]:
        key = names.manifest_key(*place)
        data = await self._read(place)
        if data is None:  # purged since it was listed
            return None, ()
        try:
            manifest = decode_manifest(data)
        except msgspec.MsgspecError:
            return None, (_finding("corrupt", key, place),)
        if (manifest.tenant, manifest.name, manifest.version) != place:
            return None, (_finding("corrupt", key, place),)
        known, _ = await self._index.place(place)
        return manifest, (_finding("unindexed", key, place),) if known == "none" else ()

    async def _blob(self, place: ManifestKey, key: str, sha256: str, path: Path) -> tuple[Finding, ...]:
        try:
            await self._objects.download(key, path, sha256)
        except NotFound:
            fault: Kind = "missing"
        except CorruptObject:
            fault = "corrupt"
        else:
            await run_sync(path.unlink)
            return ()
        still_there = await self._read(place) is not None
        return (_finding(fault, key, place),) if still_there else ()


def _finding(kind: Kind, key: str, place: ManifestKey) -> Finding:
    return Finding(kind, key, f"{place.tenant}/{place.name}@{place.version}")
