"""Reads every manifest and blob and compares them with their digests and with the index. Changes nothing."""

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
FAULTS: frozenset[Kind] = frozenset({"missing", "corrupt"})  # crashed uploads leave the other kinds


class Finding(NamedTuple):
    kind: Kind
    key: str
    version: str  # tenant/name@version that the object belongs to; "": none

    @property
    def fault(self) -> bool:
        return self.kind in FAULTS


class Progress(NamedTuple):
    done: int  # objects checked
    total: int
    findings: tuple[Finding, ...] = ()


class Verifier:
    """All calls raise StoreError: a store that does not answer is no finding."""

    def __init__(self, objects: Objects, index: Index) -> None:
        self._objects = objects
        self._index = index

    async def run(self, folder: Path) -> AsyncGenerator[Progress, None]:
        """Yields after each manifest and each blob. `folder` holds one downloaded blob at a time."""
        paths = set(await self._objects.list(names.TENANTS))
        manifests = [key for path in sorted(paths) if (key := names.parse_manifest_key(path))]
        blobs = {path for path in paths if names.blob_tenant(path)}
        total, done, named = len(manifests) + len(blobs), 0, set[str]()
        for finding in await self._missing(paths):
            yield Progress(done, total, (finding,))
        for key in manifests:
            manifest, findings = await self._check_manifest(key)
            done += 1
            yield Progress(done, total, findings)
            for blob in manifest.files if manifest else ():
                named.add(blob.key)
                findings = await self._check_blob(key, blob.key, blob.sha256, folder / "blob")
                done += blob.key in blobs
                yield Progress(done, total, findings)
        for path in sorted(blobs - named):
            done += 1
            yield Progress(done, total, (Finding("unreferenced", path, ""),))

    async def _missing(self, paths: set[str]) -> list[Finding]:
        """Versions in the index that have no manifest. `paths`: what the store holds."""
        found = []
        for deleted in (False, True):
            for tenant in await self._index.tenants(deleted=deleted):
                for key in await self._indexed(tenant, deleted=deleted):
                    if names.manifest_key(*key) not in paths and not await self._read(key):
                        state, _ = await self._index.state_of(key)  # purged while we looked?
                        if state != "none":
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

    async def _read(self, key: ManifestKey) -> bytes | None:
        try:
            return await self._objects.get(names.manifest_key(*key))
        except NotFound:
            return None

    async def _check_manifest(self, key: ManifestKey) -> tuple[Manifest | None, tuple[Finding, ...]]:
        path = names.manifest_key(*key)
        data = await self._read(key)
        if data is None:  # purged since it was listed
            return None, ()
        try:
            manifest = decode_manifest(data)
        except msgspec.MsgspecError:
            return None, (_finding("corrupt", path, key),)
        if (manifest.tenant, manifest.name, manifest.version) != key:
            return None, (_finding("corrupt", path, key),)
        state, _ = await self._index.state_of(key)
        return manifest, (_finding("unindexed", path, key),) if state == "none" else ()

    async def _check_blob(
        self, key: ManifestKey, blob_key: str, sha256: str, path: Path
    ) -> tuple[Finding, ...]:
        try:
            await self._objects.download(blob_key, path, sha256)
        except NotFound:
            fault: Kind = "missing"
        except CorruptObject:
            fault = "corrupt"
        else:
            await run_sync(path.unlink)
            return ()
        still_there = await self._read(key) is not None
        return (_finding(fault, blob_key, key),) if still_there else ()


def _finding(kind: Kind, path: str, key: ManifestKey) -> Finding:
    return Finding(kind, path, f"{key.tenant}/{key.name}@{key.version}")
