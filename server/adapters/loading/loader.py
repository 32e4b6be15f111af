"""Loads adapters from the object store into host RAM: fetch, verify, parse, check, pack.

    store or disk --SHA-256 of the stream--> one buffer --parse, shapes, finite, pack--> RAM, with a checksum
                                               and after that, if the disk tier admits it: a copy on disk

Loads run in thread_pools.py, never on the engine's thread. Concurrent requests for one adapter share a load
and its future. A failed load is not remembered: the next request tries again. The RAM that a load takes is
reserved before its first byte is read.
"""

import logging
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import NamedTuple

import msgspec

from adapters_store.manifest import Manifest, content_digest, decode_manifest
from adapters_store.object_store.store import Objects
from server.adapters.cache.disk_tier import DiskTier
from server.adapters.cache.ram_tier import RamTier
from server.adapters.loading.buffer_pool import BufferPool
from server.adapters.loading.disk_writer import DiskWriter, LoadedFile
from server.adapters.loading.packing import Packer
from server.adapters.loading.thread_pools import LoadPools
from server.adapters.methods.interface import Packed
from server.errors import (
    CorruptObject,
    InvalidAdapter,
    ModelNotFound,
    NotFound,
    PolypeftError,
    StoreError,
)
from server.messages import AdapterRef

MAX_URGENT_BYTES = 8 << 20  # of a file: a larger one would delay running rows by a step or more
MAX_SOURCES = 4096
log = logging.getLogger(__name__)


class Load(NamedTuple):
    """A load that has ended: which version, its seconds, the bytes it gave, and the code of its error."""

    version: "AdapterRef | Manifest"
    seconds: float
    nbytes: int = 0
    error: str | None = None


class Loader:
    """Loads for the engine's cache and its admission check. Used on the engine's thread; loads are not."""

    def __init__(self, objects: Objects, disk: DiskTier, ram: RamTier[Packed], packer: Packer) -> None:
        self.objects = objects
        self.disk = disk
        self.ram = ram
        self.packer = packer
        self.copies_to_disk = not objects.on_same_disk(disk.folder)  # not if the store is on the same disk
        self.observations: list[tuple[str, str, float]] = []  # (name, tier, value)
        self.loads: list[Load] = []
        self.sources: OrderedDict[str, str] = OrderedDict()  # digest -> tier that it was last loaded from
        self.corrupt: Counter[str] = Counter()  # by tier, except the disk's
        self._running: dict[str, Future[Packed]] = {}
        self._lock = threading.Lock()
        self._buffers = BufferPool()
        self.disk_writer = DiskWriter(disk, ram, self._buffers)
        self._pools = LoadPools()

    @property
    def corrupt_copies(self) -> dict[str, int]:
        """By tier: copies that failed verification, and were not used."""
        return {**dict.fromkeys(("device", "ram", "store"), 0), **self.corrupt, "disk": self.disk.corrupt}

    def fetch(self, ref: AdapterRef) -> "Future[Packed]":
        """The packed adapter: done at once if in RAM, else when loaded. Expected errors are PolypeftErrors.

        The adapter is claimed in RAM: the caller must `release` it, even if the load fails.
        """
        self.ram.claim(ref.digest)
        self.ram.touch(ref.digest, ref.tenant)
        return self._once(ref, lambda: self._manifest(ref))

    def check(self, manifest: Manifest) -> "Future[Packed]":
        """Load a version that is staged but not published; the future fails with InvalidAdapter if it cannot
        be served. Claims nothing. Raises StoreError for a manifest that does not match its digest.
        """
        check_identity(manifest)
        return self._once(manifest, lambda: manifest)

    def prioritise(self, digest: str) -> bool:
        """Make the load urgent, since a free row waits for it; whether it now is."""
        return self._pools.prioritise(digest)

    def claim(self, digest: str) -> None:
        self.ram.claim(digest)

    def release(self, digest: str) -> None:
        self.ram.release(digest)

    def forget(self, digest: str) -> None:
        self.ram.drop(digest)

    def report_corrupt(self, digest: str, tier: str) -> None:
        """Count a copy in memory that fails its checksum, and drop it from RAM: the next request loads it."""
        log.warning("An adapter in memory (%s) did not match its checksum; it is loaded again.", tier)
        self.corrupt[tier] += 1
        self.ram.drop(digest)

    def take_observations(self) -> list[tuple[str, str, float]]:
        """The observations since the last call."""
        taken = self.observations[:]
        del self.observations[: len(taken)]
        return taken

    def take_loads(self) -> list[Load]:
        """The loads that have ended since the last call."""
        taken = self.loads[:]
        del self.loads[: len(taken)]
        return taken

    def close(self) -> None:
        self.ram.close()
        self._pools.close()
        self.disk_writer.close()

    def _once(self, version: AdapterRef | Manifest, manifest: Callable[[], Manifest]) -> "Future[Packed]":
        """The future of the load that runs already, or of a new one. `manifest` is called on its thread."""
        start, digest = time.perf_counter(), version.digest
        future: Future[Packed] = Future()
        with self._lock:
            if running := self._running.get(digest):
                return running
            packed = self.ram.get(digest)
            if packed is None:
                self._running[digest] = future
        if packed is not None:
            future.set_result(packed)
            self._observe("ram", start, version, packed.nbytes)
        else:
            self._pools.submit(digest, partial(self._run, future, version, start, manifest))
        return future

    def _run(
        self,
        future: "Future[Packed]",
        version: AdapterRef | Manifest,
        start: float,
        get_manifest: Callable[[], Manifest],
        urgent: bool,
    ) -> None:
        """One load, on a thread of a pool. An error after the future is set is only logged."""
        digest = version.digest
        try:
            manifest = get_manifest()
            if urgent and not _is_small(manifest):
                self._pools.postpone(digest, partial(self._run, future, version, start, lambda: manifest))
                return
            self._load(future, digest, version.tenant, manifest)
        except BaseException as error:
            self._finished(digest)
            if future.done():
                log.exception("After an adapter was loaded")
            else:
                code = error.code if isinstance(error, PolypeftError) else PolypeftError.code
                self.loads.append(Load(version, time.perf_counter() - start, error=code))
                future.set_exception(error)

    def _load(self, future: "Future[Packed]", digest: str, tenant: str, manifest: Manifest) -> None:
        check_identity(manifest)
        base = self.packer.base
        if manifest.base_digest != base.digest:
            raise InvalidAdapter(
                f"The adapter was made for the base {manifest.base!r}; this server runs {base.id!r}."
            )
        self.ram.claim(digest)  # until all memory of this load is free again, or the packed adapter's
        try:
            self._fetch_and_pack(future, digest, tenant, manifest)
        except BaseException:
            self.ram.release(digest)
            raise

    def _fetch_and_pack(self, future: "Future[Packed]", digest: str, tenant: str, manifest: Manifest) -> None:
        blob, start, max_bytes = manifest.weights, time.perf_counter(), self.packer.max_bytes(manifest)
        self.ram.reserve(digest, tenant, blob.bytes + max_bytes)
        try:
            buffer = self._buffers.take(blob.bytes)
            raw = buffer[: blob.bytes]
            data = memoryview(raw.numpy())  # type: ignore[arg-type]  # it is a buffer
            self.disk.touch(blob.sha256, tenant)
            tier = "disk" if self.disk.read(blob.sha256, data) else "store"
            if tier == "store":
                self._download(manifest, data)
            packed = self.packer.pack(manifest, raw)
            if packed.nbytes > max_bytes:
                raise StoreError("The adapter's manifest does not describe its weights.")
        except BaseException:
            self.ram.cancel(digest)
            raise
        self.ram.insert(digest, packed, extra=blob.bytes)
        self._observe(tier, start, manifest, packed.nbytes)
        self._finished(digest)
        future.set_result(packed)
        file = LoadedFile(digest, tenant, packed, blob, buffer)
        self.disk_writer.end(file, copy=self.copies_to_disk and tier == "store")

    def _finished(self, digest: str) -> None:
        with self._lock:
            self._running.pop(digest, None)

    def _manifest(self, ref: AdapterRef) -> Manifest:
        try:
            manifest = decode_manifest(self.objects.get_sync(ref.manifest_key))
        except NotFound as error:
            raise ModelNotFound(f"The model `{ref.name}` does not exist.", param="model") from error
        except msgspec.DecodeError as error:
            raise StoreError("The adapter's manifest is damaged.") from error
        if manifest.digest != ref.digest:
            raise StoreError("The adapter's manifest is not the one its index names.")
        return manifest

    def _download(self, manifest: Manifest, data: memoryview) -> None:
        """Fill `data` from the store. Corrupt bytes are read once more: the transfer may be at fault."""
        blob = manifest.weights
        for last in (False, True):
            try:
                self.objects.read_sync(blob.key, data, blob.sha256)
            except NotFound as error:  # the manifest is there, so this is damage and not an unknown model
                raise StoreError("The adapter's weights are missing from the store.") from error
            except CorruptObject:
                self.corrupt["store"] += 1
                if last:
                    raise
            else:
                return

    def _observe(self, tier: str, start: float, version: AdapterRef | Manifest, nbytes: int) -> None:
        seconds = time.perf_counter() - start
        observed = (("adapter_load_seconds", tier, seconds), ("adapter_load_bytes", tier, nbytes))
        self.observations.extend(observed)
        self.loads.append(Load(version, seconds, nbytes))
        with self._lock:
            self.sources[version.digest] = tier
            if len(self.sources) > MAX_SOURCES:
                self.sources.popitem(last=False)


def _is_small(manifest: Manifest) -> bool:
    """Whether loading takes less than a step. DoRA's does not: it computes norms of the base's weights."""
    return manifest.weights.bytes <= MAX_URGENT_BYTES and not manifest.config.get("use_dora")


def check_identity(manifest: Manifest) -> None:
    """Raises StoreError for a manifest that does not match its own digest."""
    content = (manifest.method, manifest.base_digest, manifest.config, manifest.weights.sha256)
    if content_digest(*content) != manifest.digest:
        raise StoreError("The adapter's manifest does not match its own digest.")
