"""Adapters by tenant, name and version. The only place that knows both the object store and the index.

A version exists once its manifest does: blobs are written first, then the manifest, only if absent, then the
index in Valkey. The index can be rebuilt from the manifests and the deletion marks beside them, except for
aliases, pins and the history. Knows no adapter methods, no shapes and no engine. Every StoreError means
"try again".
"""

import logging
import secrets
import time
from pathlib import Path

from anyio.to_thread import run_sync
from redis.asyncio import Redis

from adapters_store import names
from adapters_store.alias_target import heaviest, pick
from adapters_store.history import HistoryEntry
from adapters_store.index.index import Found, Index
from adapters_store.index.records import Adapter, Deleted, Version, summary
from adapters_store.maintenance.blob_leases import BlobLeases
from adapters_store.maintenance.collector import Collector
from adapters_store.maintenance.deletions import DeletionReconciler
from adapters_store.maintenance.rebuild_index import IndexRebuild
from adapters_store.maintenance.verify import Verifier
from adapters_store.manifest import Blob, Manifest, decode_manifest, encode_manifest
from adapters_store.object_store.store import Objects, sha256_of
from adapters_store.outage import LastAnswers
from adapters_store.registry.aliases import MAX_ALIASES, Aliases, unknown
from adapters_store.registry.quota import LimitsOf, Quota, too_many_versions, unlimited
from server.errors import (
    Conflict,
    InvalidField,
    NotFound,
    PreconditionFailed,
    StoreError,
    shown,
)

MAX_FILE_NAME = 128
MAX_VERSIONS = 1000  # of one adapter, deleted ones not counted
GRACE_SECONDS = 24 * 3600.0  # between the first byte of an upload and its publication
RETENTION_SECONDS = 7 * 24 * 3600.0  # that a deleted version can be restored
PAGE_SIZE = 100
log = logging.getLogger(__name__)


class Registry:
    """`actor`: who makes a change, for the history; `condition`: its precondition, see `Index`.

    `limits_of` tells what a tenant may keep; it is asked at every change. `last`: versions that were resolved
    lately, for when Valkey is away.
    """

    def __init__(
        self,
        objects: Objects,
        redis: Redis,
        limits_of: LimitsOf = unlimited,
        *,
        last: LastAnswers[Found] | None = None,
        keep_versions: int = 0,
        retention_seconds: float = RETENTION_SECONDS,
        grace_seconds: float = GRACE_SECONDS,
    ) -> None:
        self._objects = objects
        self._index = Index(redis)
        self._leases = BlobLeases(redis)
        self._deletions = DeletionReconciler(objects, self._index)
        self.aliases = Aliases(self._index)
        self._limits_of = limits_of
        self._last = last or LastAnswers()
        self._keep_versions = keep_versions
        self.retention = retention_seconds
        self._grace_seconds = grace_seconds
        self.collector = Collector(objects, self._leases, grace_seconds)
        self._rebuild = IndexRebuild(objects, self._index, self._deletions)
        self.verifier = Verifier(objects, self._index)

    async def stage(self, tenant: str, files: list[tuple[str, Path]]) -> list[Blob]:
        """Store (name, file) pairs as blobs, each under a new key.

        They become visible when a manifest that names them is published, within the grace period. Raises
        InvalidField for a file name.
        """
        blobs = []
        for name, path in files:
            _check_file_name(name)
            sha256 = await run_sync(sha256_of, path)
            key = names.blob_key(tenant, sha256, secrets.token_hex(8))
            blobs.append(Blob(name=name, key=key, sha256=sha256, bytes=(await run_sync(path.stat)).st_size))
        await self._leases.add([blob.key for blob in blobs], self._grace_seconds)
        for blob, (_, path) in zip(blobs, files, strict=True):
            await self._objects.put(blob.key, path, blob.sha256)
        return blobs

    async def next_version(self, tenant: str, name: str, size: int = 0) -> int:
        """The number to publish under. It is not reserved: of several publishers of one number, one wins.

        Numbers are never used again, not even after a deletion. Raises QuotaExceeded if the tenant may have
        no further adapter, the adapter no further version, or the tenant no further `size` bytes.
        """
        usage = await self._index.usage(tenant, names.check_name(name))
        quota = await self._quota(tenant)
        if usage.versions == 0 and usage.adapters >= quota.adapters:
            raise quota.too_many()
        if usage.bytes + size > quota.adapter_bytes:
            raise quota.too_many_bytes()
        if usage.versions >= MAX_VERSIONS or usage.last >= names.MAX_VERSION:
            raise too_many_versions(name, MAX_VERSIONS)
        return usage.last + 1

    async def publish(self, manifest: Manifest) -> None:
        """Make a version of staged blobs visible, and `latest` if it is promoted.

        Raises Conflict if the number was taken meanwhile, even by a version that is deleted again;
        QuotaExceeded; StoreError if the leases of its blobs have expired.
        """
        names.check_name(manifest.name)
        version, data = summary(manifest), encode_manifest(manifest)
        taken = f"Version {manifest.version} of adapter {shown(manifest.name)}"
        conflict = Conflict(f"{taken} came from another upload meanwhile; try again.", param="name")
        if not await self._objects.create(version.manifest_key, data):
            # Its publisher may have died before it reached the index: then `next_version` would not advance.
            await self._index_stored(version.manifest_key)
            raise conflict
        quota = await self._quota(manifest.tenant)
        answer = await self._add(manifest, quota)
        if answer != "done":
            await self._objects.delete(version.manifest_key)
            if answer == "expired":
                raise StoreError("The upload took longer than its blobs are kept; send it again.")
            if answer == "too many bytes":
                raise quota.too_many_bytes()
            raise quota.too_many() if answer == "too many" else conflict
        if self._keep_versions:
            await self._try_finish_deletes(manifest.tenant, manifest.name)

    async def resolve(
        self, tenant: str, name: str, selector: str | None = None, sticky: str | None = None
    ) -> Version:
        """The version that `selector` means: None is the latest, "3" and "v3" a number, else an alias.

        If the alias has weights, `sticky` decides, the same each time; without it the heaviest version wins.
        Raises ModelNotFound, with the same words for another tenant's adapter as for none.
        """
        found: Version | None = None
        alias = names.LATEST if selector is None else selector
        if names.is_name(name) and names.is_name(alias):
            number = names.version_number(alias)
            wanted = alias if number is None else number
            target, versions = await self._last.ask(
                (tenant, name, wanted), lambda: self._index.find(tenant, name, wanted)
            )
            if target is None:
                target = number or 0
            elif sticky is not None:
                target = pick(target, f"{tenant}\0{name}\0{alias}\0{sticky}")
            found = versions.get(heaviest(target))
        if found is None:
            raise unknown(name if selector is None else f"{name}@{selector}")
        return found

    async def get(self, tenant: str, name: str) -> Adapter:
        """Raises ModelNotFound."""
        found = await self._index.adapters(tenant, [name]) if names.is_name(name) else []
        if not found:
            raise unknown(name)
        return found[0]

    async def manifest(self, tenant: str, name: str, version: int) -> Manifest:
        """Raises ModelNotFound."""
        found = await self.resolve(tenant, name, str(version))
        try:
            return decode_manifest(await self._objects.get(found.manifest_key))
        except NotFound as error:  # purged meanwhile
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
        """Delete a version, or all of the adapter's; the digests of those deleted. They can be restored.

        `purge`: these, and those deleted before, cannot be restored; their bytes are removed at once, or when
        the store answers again. Raises ModelNotFound, PreconditionFailed.
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
        """Restore a deleted version, or all of the adapter's, and the aliases that were lost with them.

        Raises NotFound, QuotaExceeded.
        """
        answer, quota = "unknown", await self._quota(tenant)
        if names.is_name(name):
            caps = {
                "max_adapters": quota.adapters,
                "max_versions": MAX_VERSIONS,
                "max_aliases": MAX_ALIASES,
            }
            answer = await self._index.restore(tenant, name, version, actor, **caps)
        if answer == "too many":
            raise quota.too_many()
        if answer == "too many versions":
            raise too_many_versions(name, MAX_VERSIONS)
        if answer == "unknown":
            raise NotFound(f"There is no deleted adapter {shown(name)} to restore.", param="name")
        await self._try_finish_deletes(tenant, name)

    async def deleted(self, tenant: str, after: str | None = None, limit: int = 100) -> list[Deleted]:
        """Up to `limit` adapters with deleted versions, by name, those after `after`."""
        if after is not None:
            names.check_name(after, "after")
        found = await self._index.names(tenant, after, limit, deleted=True)
        return await self._index.deleted(tenant, found)

    async def history(self, tenant: str, name: str) -> list[HistoryEntry]:
        """The adapter's history, newest first; a deleted adapter has one, too. Raises ModelNotFound."""
        found = await self._index.history(tenant, name) if names.is_name(name) else []
        if not found:
            raise unknown(name)
        return found

    async def rebuild_index(self) -> int:
        """Rebuild the index from the store; the number of versions, deleted ones included."""
        return await self._rebuild.run()

    async def finish_deletes(self) -> None:
        """Purge versions deleted longer ago than the retention, and finish interrupted deletions."""
        while due := await self._index.due_for_purge(time.time() - self.retention, PAGE_SIZE):
            for key in due:
                cutoff = time.time() - self.retention
                await self._index.purge(key.tenant, key.name, key.version, "server", cutoff)
        await self._deletions.reconcile()

    async def _try_finish_deletes(self, tenant: str, name: str) -> None:
        """The index has decided already; if the store fails now, a later call brings it in line."""
        try:
            await self._deletions.reconcile(names.manifest_prefix(tenant, name))
        except StoreError as error:
            log.warning("the store does not know yet what is deleted; it is told later: %s", error)

    async def _index_stored(self, key: str) -> None:
        """Add a stored manifest to the index, if it still exists."""
        try:
            manifest = decode_manifest(await self._objects.get(key))
        except NotFound:
            return
        await self._add(manifest, await self._quota(manifest.tenant))

    async def _add(self, manifest: Manifest, quota: Quota) -> str:
        return await self._index.add(
            summary(manifest),
            [blob.key for blob in manifest.files],
            manifest.by or "server",
            new=True,
            max_adapters=quota.adapters,
            max_bytes=quota.adapter_bytes,
            keep=self._keep_versions,
        )

    async def _quota(self, tenant: str) -> Quota:
        return Quota.of(await self._limits_of(tenant))

    async def list(self, tenant: str, after: str | None = None, limit: int = 100) -> list[Adapter]:
        """Up to `limit` of the tenant's adapters, by name, those after `after`."""
        if after is not None:
            names.check_name(after, "after")
        return await self._index.adapters(tenant, await self._index.names(tenant, after, limit))


def _check_file_name(name: str) -> None:
    """Raises InvalidField."""
    if not names.is_file_name(name, MAX_FILE_NAME):
        raise InvalidField(
            f"file name {shown(name)} must be 1 to {MAX_FILE_NAME} characters without a path.", param="files"
        )
