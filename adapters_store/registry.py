"""Adapters by tenant, name and version. The only place that knows both the object store and the index.

A version is its manifest: blobs are written first, the manifest last and only if absent, and then the
index in Valkey learns of it. What the index says can always be made again from the manifests, except
aliases. Knows no methods, no shapes and no engine. Every StoreError means "try again".
"""

import asyncio
import logging
from collections.abc import Iterable
from pathlib import Path

from anyio.to_thread import run_sync
from redis.asyncio import Redis

from adapters_store import names
from adapters_store.index import Adapter, Index, Version, summary
from adapters_store.manifest import Blob, Manifest, decode_manifest, encode_manifest
from adapters_store.objects import Objects, sha256_of
from server.errors import Conflict, InvalidField, ModelNotFound, NotFound, QuotaExceeded, StoreError, shown

MAX_FILE_NAME = 128
MAX_VERSIONS = 1000  # of one adapter, at a time
MAX_ALIASES = 100  # of one adapter
NO_QUOTA = 2**53
log = logging.getLogger(__name__)


class Registry:
    def __init__(self, objects: Objects, redis: Redis, max_adapters: int = 10_000) -> None:
        self._objects = objects
        self._index = Index(redis)
        self._max_adapters = max_adapters

    async def stage(self, tenant: str, files: list[tuple[str, Path]]) -> list[Blob]:
        """Store (name, file) pairs by content. Nothing is visible until a manifest names them."""
        return [await self._stage_one(tenant, _file_name(name), path) for name, path in files]

    async def next_version(self, tenant: str, name: str) -> int:
        """The number to publish under. It is not reserved: of several who publish it, one wins.

        Numbers are never used again, not even after a deletion. Raises QuotaExceeded for one name too many.
        """
        standing = await self._index.standing(tenant, names.check_name(name))
        if standing.versions == 0 and standing.adapters >= self._max_adapters:
            raise self._quota()
        if standing.versions >= MAX_VERSIONS or standing.last >= names.MAX_VERSION:
            raise QuotaExceeded(
                f"Adapter {shown(name)} has {MAX_VERSIONS} versions, the most it may; delete one."
            )
        return standing.last + 1

    async def publish(self, manifest: Manifest) -> None:
        """Make a version visible, and `latest` if it is promoted.

        Raises Conflict if the number was taken meanwhile, also if that version is deleted again.
        """
        names.check_name(manifest.name)
        version = summary(manifest)
        taken = f"Version {manifest.version} of adapter {shown(manifest.name)}"
        conflict = Conflict(f"{taken} came from another upload meanwhile; try again.", param="name")
        if not await self._objects.create(version.manifest_key, encode_manifest(manifest)):
            # Whoever wrote it may have died before the index knew; then the next number would never come.
            await self._index_stored(version.manifest_key, new=True)
            raise conflict
        added = await self._index.add(version, self._max_adapters, new=True)
        if added != "done":
            await self._objects.delete(version.manifest_key)
            raise self._quota() if added == "too many" else conflict

    async def resolve(self, tenant: str, name: str, selector: str | None = None) -> Version:
        """The version that `selector` means: None is the latest, "3" and "v3" a number, else an alias.

        Raises NotFound, the same for what does not exist and for what is another tenant's.
        """
        found = None
        alias = names.LATEST if selector is None else selector
        if names.is_name(name) and names.is_name(alias):
            number = names.version_number(alias)
            found = await self._index.find(tenant, name, alias if number is None else number)
        if found is None:
            raise _unknown(name if selector is None else f"{name}@{selector}")
        return found

    async def get(self, tenant: str, name: str) -> Adapter:
        found = await self._index.adapters(tenant, [name]) if names.is_name(name) else []
        if not found:
            raise _unknown(name)
        return found[0]

    async def manifest(self, tenant: str, name: str, version: int) -> Manifest:
        found = await self.resolve(tenant, name, str(version))
        try:
            return decode_manifest(await self._objects.get(found.manifest_key))
        except NotFound as error:  # deleted since we looked
            raise _unknown(f"{name}@{version}") from error

    async def set_alias(self, tenant: str, name: str, alias: str, version: int) -> None:
        """Point `alias` at a version, wherever it pointed before."""
        names.check_alias(alias)
        done = "no version"
        if names.is_name(name):
            done = await self._index.alias(tenant, name, alias, version, MAX_ALIASES)
        if done == "too many":
            raise QuotaExceeded(f"Adapter {shown(name)} has {MAX_ALIASES} aliases, the most it may.")
        if done == "no version":
            raise _unknown(f"{name}@{version}")

    async def delete(self, tenant: str, name: str, version: int | None = None) -> list[str]:
        """Delete a version, or the adapter; the digests of what is gone. Blobs stay for a later sweep.

        Once the index has forgotten a version it is deleted, also after a crash: its manifest is on the list
        of those to remove, which `finish_deletes` works off.
        """
        removed = await self._index.remove(tenant, name, version) if names.is_name(name) else []
        if not removed:
            raise _unknown(name if version is None else f"{name}@{version}")
        try:
            await self._remove_manifests([gone.manifest_key for gone in removed])
        except StoreError as error:
            log.warning("manifests of a deleted adapter stay until the next finish_deletes: %s", error)
        return [gone.digest for gone in removed]

    async def finish_deletes(self) -> None:
        """Remove the manifests that a crash or a failing store left behind. Call it at start."""
        await self._remove_manifests(await self._index.deleting())

    async def rebuild_index(self) -> int:
        """Make the index say what the manifests say; how many versions there are. Aliases stay.

        Meant for a lost or damaged index. A version deleted while this runs may come back.
        """
        await self.finish_deletes()
        keys = [key for key in await self._objects.list(names.TENANTS) if names.parse_manifest_key(key)]
        for start in range(0, len(keys), 64):
            await asyncio.gather(*(self._index_stored(key, new=False) for key in keys[start : start + 64]))
        for tenant in await self._index.tenants():
            await self._forget_missing(tenant, set(keys))
        return len(keys)

    async def list(self, tenant: str, after: str | None = None, limit: int = 100) -> list[Adapter]:
        """Up to `limit` of the tenant's adapters by name, those after `after`."""
        if after is not None:
            names.check_name(after, "after")
        return await self._index.adapters(tenant, await self._index.names(tenant, after, limit))

    async def _stage_one(self, tenant: str, name: str, path: Path) -> Blob:
        sha256 = await run_sync(sha256_of, path)
        key = names.blob_key(tenant, sha256)
        await self._objects.put(key, path, sha256)
        return Blob(name=name, key=key, sha256=sha256, bytes=(await run_sync(path.stat)).st_size)

    async def _index_stored(self, key: str, *, new: bool) -> None:
        """Let the index know of a manifest that exists, if it still does."""
        try:
            manifest = decode_manifest(await self._objects.get(key))
        except NotFound:
            return
        await self._index.add(summary(manifest), NO_QUOTA, new=new)

    async def _forget_missing(self, tenant: str, stored: set[str]) -> None:
        after = None
        while page := await self.list(tenant, after):
            after = page[-1].name
            for version in (version for adapter in page for version in adapter.versions):
                if version.manifest_key not in stored and not await self._exists(version.manifest_key):
                    await self._index.remove(tenant, version.name, version.version)

    async def _exists(self, key: str) -> bool:
        try:
            await self._objects.head(key)
        except NotFound:
            return False
        return True

    async def _remove_manifests(self, keys: Iterable[str]) -> None:
        for key in keys:
            await self._objects.delete(key)
            await self._index.deleted([key])

    def _quota(self) -> QuotaExceeded:
        return QuotaExceeded(f"A tenant may have {self._max_adapters} adapters; delete one first.")


def _file_name(name: str) -> str:
    """A file's name is only ever shown, and offered again at download."""
    if not 0 < len(name) <= MAX_FILE_NAME or not name.isprintable() or set(name) & set("/\\"):
        raise InvalidField(
            f"file name {shown(name)} must be 1 to {MAX_FILE_NAME} characters without a path.", param="files"
        )
    return name


def _unknown(model: str) -> ModelNotFound:
    return ModelNotFound(
        f"The model {shown(model)} does not exist or you do not have access to it.", param="model"
    )
