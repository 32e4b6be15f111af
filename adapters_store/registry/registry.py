"""Adapters by tenant, name and version. The only place that knows both the object store and the index.

A version is its manifest: blobs are written first, the manifest last and only if absent, and then the
index in Valkey learns of it. What the index says can always be made again from the manifests and the marks
beside them, except aliases, pins and history. Knows no methods, no shapes and no engine. Every StoreError
means "try again".
"""

import logging
import secrets
import time
from pathlib import Path

from anyio.to_thread import run_sync
from redis.asyncio import Redis

from adapters_store import names
from adapters_store.alias_target import heaviest, pick
from adapters_store.audit_log import AuditEntry
from adapters_store.index.index import Index
from adapters_store.index.records import Adapter, Deleted, Version, summary
from adapters_store.maintenance.blob_leases import BlobLeases
from adapters_store.maintenance.collector import Collector
from adapters_store.maintenance.deletions import DeletionReconciler
from adapters_store.maintenance.rebuild_index import IndexRebuild
from adapters_store.maintenance.verify import Verifier
from adapters_store.manifest import Blob, Manifest, decode_manifest, encode_manifest
from adapters_store.object_store.store import Objects, sha256_of
from adapters_store.registry.aliases import MAX_ALIASES, Aliases, unknown
from server.errors import (
    Conflict,
    InvalidField,
    NotFound,
    PreconditionFailed,
    QuotaExceeded,
    StoreError,
    shown,
)

MAX_FILE_NAME = 128
MAX_VERSIONS = 1000  # of one adapter, at a time
GRACE_SECONDS = 24 * 3600.0  # from the first byte of an upload to its version
RETENTION_SECONDS = 7 * 24 * 3600.0
PAGE_SIZE = 100
log = logging.getLogger(__name__)


class Registry:
    """`actor` is who does it, for the history; `condition` is what must hold, as the index takes it."""

    def __init__(
        self,
        objects: Objects,
        redis: Redis,
        max_adapters: int = 10_000,
        *,
        max_bytes: int = 2**53,
        keep_versions: int = 0,
        retention_seconds: float = RETENTION_SECONDS,
        grace_seconds: float = GRACE_SECONDS,
    ) -> None:
        self._objects = objects
        self._index = Index(redis)
        self._staged = BlobLeases(redis)
        self._leftovers = DeletionReconciler(objects, self._index)
        self.aliases = Aliases(self._index)
        self._max_adapters = max_adapters
        self._max_bytes = max_bytes
        self._keep = keep_versions
        self.retention = retention_seconds
        self._grace = grace_seconds
        self.collector = Collector(objects, self._staged, grace_seconds)
        self._rebuild = IndexRebuild(objects, self._index, self._leftovers)
        self.verifier = Verifier(objects, self._index)

    async def stage(self, tenant: str, files: list[tuple[str, Path]]) -> list[Blob]:
        """Store (name, file) pairs, each under a key of its own.

        Nothing is visible until a manifest names them, which must come within the grace period.
        """
        blobs = []
        for name, path in files:
            _check_file_name(name)
            sha256 = await run_sync(sha256_of, path)
            key = names.blob_key(tenant, sha256, secrets.token_hex(8))
            blobs.append(Blob(name=name, key=key, sha256=sha256, bytes=(await run_sync(path.stat)).st_size))
        await self._staged.add([blob.key for blob in blobs], self._grace)
        for blob, (_, path) in zip(blobs, files, strict=True):
            await self._objects.put(blob.key, path, blob.sha256)
        return blobs

    async def next_version(self, tenant: str, name: str, size: int = 0) -> int:
        """The number to publish under. It is not reserved: of several who publish it, one wins.

        Numbers are never used again, not even after a deletion. Raises QuotaExceeded for one name too many,
        and if `size` bytes are more than the tenant may still keep.
        """
        standing = await self._index.standing(tenant, names.check_name(name))
        if standing.versions == 0 and standing.adapters >= self._max_adapters:
            raise self._quota()
        if standing.bytes + size > self._max_bytes:
            raise self._too_many_bytes()
        if standing.versions >= MAX_VERSIONS or standing.last >= names.MAX_VERSION:
            raise self._too_many_versions(name)
        return standing.last + 1

    async def publish(self, manifest: Manifest) -> None:
        """Make a version of blobs that were staged for it visible, and `latest` if it is promoted.

        Raises Conflict if the number was taken meanwhile, also if that version is deleted again.
        """
        names.check_name(manifest.name)
        version, data = summary(manifest), encode_manifest(manifest)
        taken = f"Version {manifest.version} of adapter {shown(manifest.name)}"
        conflict = Conflict(f"{taken} came from another upload meanwhile; try again.", param="name")
        if not await self._objects.create(version.manifest_key, data):
            # Whoever wrote it may have died before the index knew; then the next number would never come.
            await self._index_stored(version.manifest_key)
            raise conflict
        added = await self._add(manifest)
        if added != "done":
            await self._objects.delete(version.manifest_key)
            if added == "expired":
                raise StoreError("The upload took longer than its blobs are kept; send it again.")
            if added == "too many bytes":
                raise self._too_many_bytes()
            raise self._quota() if added == "too many" else conflict
        if self._keep:
            await self._try_finish_deletes(manifest.tenant, manifest.name)

    async def resolve(
        self, tenant: str, name: str, selector: str | None = None, sticky: str | None = None
    ) -> Version:
        """The version that `selector` means: None is the latest, "3" and "v3" a number, else an alias.

        Of an alias with weights, the one for `sticky`, the same each time; the heaviest without it. Raises
        NotFound, the same for what does not exist and for what is another tenant's.
        """
        found: Version | None = None
        alias = names.LATEST if selector is None else selector
        if names.is_name(name) and names.is_name(alias):
            number = names.version_number(alias)
            points, versions = await self._index.find(tenant, name, alias if number is None else number)
            if points is None:
                points = number or 0
            elif sticky is not None:
                points = pick(points, f"{tenant}\0{name}\0{alias}\0{sticky}")
            found = versions.get(heaviest(points))
        if found is None:
            raise unknown(name if selector is None else f"{name}@{selector}")
        return found

    async def get(self, tenant: str, name: str) -> Adapter:
        found = await self._index.adapters(tenant, [name]) if names.is_name(name) else []
        if not found:
            raise unknown(name)
        return found[0]

    async def manifest(self, tenant: str, name: str, version: int) -> Manifest:
        found = await self.resolve(tenant, name, str(version))
        try:
            return decode_manifest(await self._objects.get(found.manifest_key))
        except NotFound as error:  # deleted since we looked
            raise unknown(f"{name}@{version}") from error

    async def delete(
        self,
        tenant: str,
        name: str,
        version: int | None = None,
        *,
        actor: str = "server",
        condition: str = "",
        purge: bool = False,
    ) -> list[str]:
        """Delete a version, or the adapter; the digests of what is gone. It can be restored for a while.

        With `purge` it cannot, nor what was deleted before: its bytes go at once, or when the store answers
        again.
        """
        model, purged = name if version is None else f"{name}@{version}", 0
        removed: list[Version] | str = "unknown"
        if names.is_name(name):
            removed = await self._index.remove(tenant, name, version, actor, condition, purge=purge)
            if purge and removed != "changed":
                purged = await self._index.purge(tenant, name, version, actor)
        if removed == "changed":
            raise PreconditionFailed(f"Adapter {shown(name)} is not as If-Match says.", param="If-Match")
        if removed == "unknown" and not purged:
            raise unknown(model)
        await self._try_finish_deletes(tenant, name)
        return [gone.digest for gone in removed if isinstance(gone, Version)]

    async def restore(
        self, tenant: str, name: str, version: int | None = None, *, actor: str = "server"
    ) -> None:
        """Bring back a deleted version, or all of the name's, and the aliases that went with them.

        Raises NotFound, QuotaExceeded.
        """
        done = "unknown"
        if names.is_name(name):
            caps = {
                "max_adapters": self._max_adapters,
                "max_versions": MAX_VERSIONS,
                "max_aliases": MAX_ALIASES,
            }
            done = await self._index.restore(tenant, name, version, actor, **caps)
        if done == "too many":
            raise self._quota()
        if done == "too many versions":
            raise self._too_many_versions(name)
        if done == "unknown":
            raise NotFound(f"There is no deleted adapter {shown(name)} to restore.", param="name")
        await self._try_finish_deletes(tenant, name)

    async def deleted(self, tenant: str, after: str | None = None, limit: int = 100) -> list[Deleted]:
        """Up to `limit` of the names with versions that can be restored, those after `after`."""
        if after is not None:
            names.check_name(after, "after")
        found = await self._index.names(tenant, after, limit, deleted=True)
        return await self._index.deleted(tenant, found)

    async def history(self, tenant: str, name: str) -> list[AuditEntry]:
        """Newest first; also of an adapter that is deleted. Raises NotFound."""
        found = await self._index.history(tenant, name) if names.is_name(name) else []
        if not found:
            raise unknown(name)
        return found

    async def rebuild_index(self) -> int:
        """Make the index say what the store says; how many versions there are, deleted ones included."""
        return await self._rebuild.run()

    async def finish_deletes(self) -> None:
        """Purge what was deleted too long ago, and what a crash or a failing store left behind."""
        while due := await self._index.due(time.time() - self.retention, PAGE_SIZE):
            for place in due:
                cutoff = time.time() - self.retention
                await self._index.purge(place.tenant, place.name, place.version, "server", cutoff)
        await self._leftovers.settle()

    async def _try_finish_deletes(self, tenant: str, name: str) -> None:
        """Once the index has changed a version is deleted or restored; the store can follow later."""
        try:
            await self._leftovers.settle(names.manifest_prefix(tenant, name))
        except StoreError as error:
            log.warning("the store does not know yet what is deleted; it is told later: %s", error)

    async def _index_stored(self, key: str) -> None:
        """Let the index know of a manifest that exists, if it still does."""
        try:
            manifest = decode_manifest(await self._objects.get(key))
        except NotFound:
            return
        await self._add(manifest)

    async def _add(self, manifest: Manifest) -> str:
        return await self._index.add(
            summary(manifest),
            [blob.key for blob in manifest.files],
            manifest.by or "server",
            new=True,
            max_adapters=self._max_adapters,
            max_bytes=self._max_bytes,
            keep=self._keep,
        )

    def _quota(self) -> QuotaExceeded:
        return QuotaExceeded(f"A tenant may have {self._max_adapters} adapters; delete one first.")

    def _too_many_bytes(self) -> QuotaExceeded:
        return QuotaExceeded(
            f"A tenant may keep {self._max_bytes} bytes of adapters, deleted ones that can be restored "
            "included; purge some first."
        )

    def _too_many_versions(self, name: str) -> QuotaExceeded:
        return QuotaExceeded(
            f"Adapter {shown(name)} has {MAX_VERSIONS} versions, the most it may; delete one."
        )

    async def list(self, tenant: str, after: str | None = None, limit: int = 100) -> list[Adapter]:
        """Up to `limit` of the tenant's adapters by name, those after `after`."""
        if after is not None:
            names.check_name(after, "after")
        return await self._index.adapters(tenant, await self._index.names(tenant, after, limit))


def _check_file_name(name: str) -> None:
    """A file's name is only ever shown, and offered again at download."""
    if not 0 < len(name) <= MAX_FILE_NAME or not name.isprintable() or set(name) & set("/\\"):
        raise InvalidField(
            f"file name {shown(name)} must be 1 to {MAX_FILE_NAME} characters without a path.", param="files"
        )
