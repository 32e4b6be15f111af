"""From the object store to host RAM: fetch, verify, parse, check, pack. Never on the engine's thread.

    store or disk --SHA-256 while it streams--> one buffer --parse, shapes, finite, pack--> RAM, sealed
                                                   and only then, if worth it: a copy on disk

One load at a time per adapter, however many ask: they get the same future. A failed load is not
remembered; the next request tries again. Which thread loads, thread_pools.py says. What a load takes of RAM
is reserved before the first byte comes.
"""

import logging
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from math import prod

import msgspec
import torch

from adapters_store.manifest import Manifest, content_digest, decode_manifest
from adapters_store.object_store.store import Objects
from server.adapters.cache.disk_tier import DiskTier
from server.adapters.cache.ram_tier import RamTier
from server.adapters.checksum import checksum
from server.adapters.formats.safetensors import find_non_finite, view_tensors
from server.adapters.loading.buffer_pool import BufferPool
from server.adapters.loading.disk_writer import DiskWriter, LoadedFile
from server.adapters.loading.parse_cache import HeaderLimits, PackPlan, ParseCache
from server.adapters.loading.thread_pools import LoadPools
from server.adapters.methods.interface import Method, Packed, Spec
from server.adapters.sites import Base
from server.errors import CorruptObject, InvalidAdapter, ModelNotFound, NotFound, StoreError
from server.kernels.cpu.int8.quantization import is_dequantised
from server.messages import AdapterRef

MAX_URGENT_BYTES = 8 << 20  # of a file: larger ones would take a step's time and more from the rows that run
SOURCES = 4096  # digests of which it is known where they were found
log = logging.getLogger(__name__)


class Loader:
    def __init__(
        self,
        objects: Objects,
        disk: DiskTier,
        ram: RamTier[Packed],
        methods: Mapping[str, Method],
        base: Base,
        weights: Mapping[str, torch.Tensor],  # the base's own, by site, read-only
        dtype: torch.dtype,
        limits: HeaderLimits,
        *,
        pinned: bool = False,  # pack into memory that a GPU can copy from by itself
    ) -> None:
        self.objects = objects
        self.disk = disk
        self.ram = ram
        self.methods = methods
        self.base = base
        self.weights = weights
        self.dtype = dtype
        self.recipes = ParseCache(methods, base, limits)
        self.pinned = pinned
        self.copies = not objects.beside(disk.folder)  # on disk, of what comes from the store
        self.observations: list[tuple[str, str, float]] = []  # (name, tier, value)
        self.sources: OrderedDict[str, str] = OrderedDict()  # digest -> where it was found last
        self.corrupt: Counter[str] = Counter()  # see corrupt_copies
        self._running: dict[str, Future[Packed]] = {}
        self._lock = threading.Lock()
        self._desk = BufferPool()
        self.keeper = DiskWriter(disk, ram, self._desk)
        self._lanes = LoadPools()

    @property
    def corrupt_copies(self) -> dict[str, int]:
        """By tier: copies that were not what they should be, and were not used."""
        return {**dict.fromkeys(("device", "ram", "store"), 0), **self.corrupt, "disk": self.disk.corrupt}

    def fetch(self, ref: AdapterRef) -> "Future[Packed]":
        """The packed adapter: at once from RAM, else when it has been loaded. Errors are PolypeftError's.

        It is claimed in RAM: the caller must `release` it, whatever comes of the load.
        """
        self.ram.claim(ref.digest)
        self.ram.touch(ref.digest, ref.tenant)
        return self._once(ref.digest, ref.tenant, lambda: self._manifest(ref))

    def check(self, manifest: Manifest) -> "Future[Packed]":
        """Load a version that is staged but not published; InvalidAdapter if it cannot serve. No claim.

        Raises StoreError for a manifest that is not what its digest says.
        """
        check_identity(manifest)
        return self._once(manifest.digest, manifest.tenant, lambda: manifest)

    def hasten(self, digest: str) -> bool:
        """A place in the batch stands empty until this adapter is there; whether it will be soon."""
        return self._lanes.hasten(digest)

    def claim(self, digest: str) -> None:
        self.ram.claim(digest)

    def release(self, digest: str) -> None:
        self.ram.release(digest)

    def forget(self, digest: str) -> None:
        self.ram.drop(digest)

    def spoiled(self, digest: str, tier: str) -> None:
        """A copy in memory is not what was loaded: count it, and load afresh next time."""
        log.warning("An adapter in memory (%s) did not match its seal; it is loaded again.", tier)
        self.corrupt[tier] += 1
        self.ram.drop(digest)

    def take_observations(self) -> list[tuple[str, str, float]]:
        """Since the last call."""
        taken = self.observations[:]
        del self.observations[: len(taken)]
        return taken

    def close(self) -> None:
        self.ram.close()
        self._lanes.close()
        self.keeper.close()

    def _once(self, digest: str, tenant: str, manifest: Callable[[], Manifest]) -> "Future[Packed]":
        start = time.perf_counter()
        future: Future[Packed] = Future()
        with self._lock:
            if running := self._running.get(digest):
                return running
            found = self.ram.get(digest)
            if found is None:
                self._running[digest] = future
        if found is not None:
            future.set_result(found)
            self._observe("ram", start, digest, found.nbytes)
        else:
            self._lanes.submit(digest, partial(self._run, future, digest, tenant, manifest))
        return future

    def _run(
        self,
        future: "Future[Packed]",
        digest: str,
        tenant: str,
        manifest: Callable[[], Manifest],
        hastily: bool,
    ) -> None:
        """One load, on a thread of its own. What goes on after the future is set, nobody waits for."""
        try:
            found = manifest()
            if hastily and not _small(found):
                self._lanes.postpone(digest, partial(self._run, future, digest, tenant, lambda: found))
                return
            self._load(future, digest, tenant, found)
        except BaseException as error:
            self._finished(digest)
            if future.done():
                log.exception("After an adapter was loaded")
            else:
                future.set_exception(error)

    def _load(self, future: "Future[Packed]", digest: str, tenant: str, manifest: Manifest) -> None:
        check_identity(manifest)
        if manifest.base_digest != self.base.digest:
            raise InvalidAdapter(
                f"The adapter was made for the base {manifest.base!r}; this server runs {self.base.id!r}."
            )
        self.ram.claim(digest)  # until the last byte that this load takes is free again, or the adapter's
        try:
            self._through(future, digest, tenant, manifest)
        except BaseException:
            self.ram.release(digest)
            raise

    def _through(self, future: "Future[Packed]", digest: str, tenant: str, manifest: Manifest) -> None:
        blob, start, most = manifest.weights, time.perf_counter(), packing_bytes(manifest, self.dtype)
        self.ram.reserve(digest, tenant, blob.bytes + most)
        try:
            sheet = self._desk.take(blob.bytes)
            raw = sheet[: blob.bytes]
            buffer = memoryview(raw.numpy())  # type: ignore[arg-type]  # it is a buffer
            self.disk.touch(blob.sha256, tenant)
            tier = "disk" if self.disk.read(blob.sha256, buffer) else "store"
            if tier == "store":
                self._download(manifest, buffer)
            packed = self._pack(manifest, raw)
            if packed.nbytes > most:
                raise StoreError("The adapter's manifest does not describe its weights.")
        except BaseException:
            self.ram.give_up(digest)
            raise
        self.ram.insert(digest, packed, extra=blob.bytes)
        self._observe(tier, start, digest, packed.nbytes)
        self._finished(digest)
        future.set_result(packed)
        self.keeper.end(LoadedFile(digest, tenant, packed, blob, sheet), copy=self.copies and tier == "store")

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

    def _download(self, manifest: Manifest, buffer: memoryview) -> None:
        """Wrong bytes are asked for once more: they may have been changed on their way."""
        blob = manifest.weights
        for last in (False, True):
            try:
                self.objects.read_sync(blob.key, buffer, blob.sha256)
            except NotFound as error:  # the manifest is there, so this is damage and not an unknown model
                raise StoreError("The adapter's weights are missing from the store.") from error
            except CorruptObject:
                self.corrupt["store"] += 1
                if last:
                    raise
            else:
                return

    def _pack(self, manifest: Manifest, raw: torch.Tensor) -> Packed:
        """`raw`: the file, uint8 [bytes]."""
        recipe = self.recipes.read(manifest, raw)
        packed = recipe.repeat(raw)
        if packed is None:
            packed = self._pack_by_method(manifest.method, recipe, raw)
            recipe.learn(packed, raw)
            packed = replace(packed, copies=None)
        if self.pinned:
            packed = replace(packed, flat=packed.flat.pin_memory())
        return replace(packed, seal=checksum(packed.flat))

    def _pack_by_method(self, method: str, recipe: PackPlan, raw: torch.Tensor) -> Packed:
        tensors = view_tensors(raw, recipe.header)
        self._check_base_copies(recipe.spec, tensors)
        try:
            return self.methods[method].pack(recipe.spec, self.base, tensors, self.weights, self.dtype)
        except InvalidAdapter:  # every number of the file is in what is packed, and that is looked through
            if name := find_non_finite(tensors):
                raise InvalidAdapter(f"Tensor {name!r} holds NaN or Inf.", param=name) from None
            raise

    def _check_base_copies(self, spec: Spec, tensors: Mapping[str, torch.Tensor]) -> None:
        """Whole tables that PEFT saves along must be the base's own: serving changed ones is not offered.

        Either side may have been rounded: the copy when it was saved, the base when it was loaded.
        """
        for name, site in spec.base_copies.items():
            copy, own = tensors[name], self.weights[site]
            same = torch.equal(copy, own.to(copy.dtype)) or torch.equal(copy.to(own.dtype), own)
            if not same and not (self.base.layout == "int8" and is_dequantised(own, copy)):
                raise InvalidAdapter(
                    f"Tensor {name!r} replaces the base's {site!r}; only low-rank changes can be served.",
                    param=name,
                )

    def _observe(self, tier: str, start: float, digest: str, nbytes: int) -> None:
        taken = ("adapter_load_seconds", tier, time.perf_counter() - start)
        self.observations.extend((taken, ("adapter_load_bytes", tier, nbytes)))
        with self._lock:
            self.sources[digest] = tier
            if len(self.sources) > SOURCES:
                self.sources.popitem(last=False)


def _small(manifest: Manifest) -> bool:
    """Loading it takes less than a step does. DoRA's norms are made of the base's weights, each time."""
    return manifest.weights.bytes <= MAX_URGENT_BYTES and not manifest.config.get("use_dora")


def packing_bytes(manifest: Manifest, dtype: torch.dtype) -> int:
    """At most what packing takes beside the file: every number twice, scaled and packed, and what is absent
    from the file but has its place (a bias of zeros).
    """
    numbers = sum(prod(shape) for _, shape in manifest.tensors.values())
    return 2 * numbers * max(dtype.itemsize, 4) + (64 << 10)


def check_identity(manifest: Manifest) -> None:
    content = (manifest.method, manifest.base_digest, manifest.config, manifest.weights.sha256)
    if content_digest(*content) != manifest.digest:
        raise StoreError("The adapter's manifest does not match its own digest.")
