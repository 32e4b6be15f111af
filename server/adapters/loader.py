"""From the object store to host RAM: fetch, verify, parse, check, pack. Never on the engine's thread.

    store --SHA-256 while streaming--> disk --SHA-256 on read--> parse, shapes, finite --pack--> RAM

One load at a time per adapter, however many ask: they get the same future. A failed load is not
remembered; the next request tries again. Loads run on two threads of low priority and one core each,
so that the rows that run keep theirs.
"""

import contextlib
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor

import msgspec
import torch

from adapters_store.manifest import Blob, Manifest, content_digest, decode_manifest
from adapters_store.objects import Objects, sha256_of
from server.adapters.formats.safetensors import find_non_finite, load_tensors, read_header
from server.adapters.methods.base import AdapterFiles, Method, Packed, Spec
from server.adapters.sites import Base
from server.adapters.tiers import DiskTier, RamTier
from server.engine.messages import AdapterRef
from server.errors import InvalidAdapter, ModelNotFound, NotFound, StoreError
from server.kernels.openmp import use_one_thread

THREADS = 2
NICENESS = 10
SOURCES = 4096  # digests of which it is known where they were found


class Limits(msgspec.Struct, frozen=True):
    max_header_bytes: int
    max_tensors: int


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
        limits: Limits,
    ) -> None:
        self.objects = objects
        self.disk = disk
        self.ram = ram
        self.methods = methods
        self.base = base
        self.weights = weights
        self.dtype = dtype
        self.limits = limits
        self.observations: list[tuple[str, str, float]] = []  # (name, tier, value); the loop takes them
        self.sources: OrderedDict[str, str] = OrderedDict()  # digest -> where it was found last
        self.corrupt = 0  # copies on disk that did not hash to their name
        self._running: dict[str, Future[Packed]] = {}
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(THREADS, "adapter-loader", initializer=_step_aside)

    def fetch(self, ref: AdapterRef) -> "Future[Packed]":
        """The packed adapter: at once from RAM, else when it has been loaded. Errors are PolypeftError's."""
        return self._once(ref.digest, lambda: self._load(self._manifest(ref)))

    def check(self, manifest: Manifest) -> "Future[Packed]":
        """Load a version that is staged but not published; InvalidAdapter if it cannot serve.

        Raises StoreError for a manifest that is not what its digest says.
        """
        check_identity(manifest)
        return self._once(manifest.digest, lambda: self._load(manifest))

    def forget(self, digest: str) -> None:
        self.ram.drop(digest)

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _once(self, digest: str, load: Callable[[], Packed]) -> "Future[Packed]":
        start = time.perf_counter()
        if found := self.ram.get(digest):
            future: Future[Packed] = Future()
            future.set_result(found)
            self._observe("ram", start, digest, found.nbytes)
            return future
        with self._lock:
            if running := self._running.get(digest):
                return running
            future = self._pool.submit(self._run, digest, load)
            self._running[digest] = future
        future.add_done_callback(lambda _done: self._finished(digest))
        return future

    def _finished(self, digest: str) -> None:
        with self._lock:
            self._running.pop(digest, None)

    def _run(self, digest: str, load: Callable[[], Packed]) -> Packed:
        packed = load()
        self.ram.add(digest, packed)
        return packed

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

    def _load(self, manifest: Manifest) -> Packed:
        check_identity(manifest)
        if manifest.base_digest != self.base.digest:
            raise InvalidAdapter(
                f"The adapter was made for the base {manifest.base!r}; this server runs {self.base.id!r}."
            )
        blob, start = manifest.weights, time.perf_counter()
        tier = "disk" if self._verified_on_disk(blob) else "store"
        if tier == "store":
            self._download(blob)
        packed = self._pack(manifest, blob)
        self._observe(tier, start, manifest.digest, packed.nbytes)
        return packed

    def _download(self, blob: Blob) -> None:
        try:
            self.objects.download_sync(blob.key, self.disk.path(blob.sha256), blob.sha256)
        except NotFound as error:  # the manifest is there, so this is damage and not an unknown model
            raise StoreError("The adapter's weights are missing from the store.") from error
        self.disk.add(blob.sha256)

    def _verified_on_disk(self, blob: Blob) -> bool:
        """A copy that does not hash to its name is dropped, and fetched again."""
        if not self.disk.has(blob.sha256):
            return False
        try:
            if sha256_of(self.disk.path(blob.sha256)) == blob.sha256:
                return True
        except FileNotFoundError:
            return False  # evicted this very moment
        self.disk.drop(blob.sha256)
        self.corrupt += 1
        return False

    def _pack(self, manifest: Manifest, blob: Blob) -> Packed:
        path = self.disk.path(blob.sha256)
        with path.open("rb") as file:
            header = read_header(
                file,
                blob.bytes,
                max_header_bytes=self.limits.max_header_bytes,
                max_tensors=self.limits.max_tensors,
            )
        method = self.methods[manifest.method]
        spec = method.parse(AdapterFiles(manifest.config, header), self.base)
        if name := find_non_finite(path, header):
            raise InvalidAdapter(f"Tensor {name!r} holds NaN or Inf.", param=name)
        tensors = load_tensors(path, header)
        self._check_base_copies(spec, tensors)
        return method.pack(spec, self.base, tensors, self.weights, self.dtype)

    def _check_base_copies(self, spec: Spec, tensors: Mapping[str, torch.Tensor]) -> None:
        """Whole tables that PEFT saves along must be the base's own: serving changed ones is not offered.

        Either side may have been rounded: the copy when it was saved, the base when it was loaded.
        """
        for name, site in spec.base_copies.items():
            copy, own = tensors[name], self.weights[site]
            if not torch.equal(copy, own.to(copy.dtype)) and not torch.equal(copy.to(own.dtype), own):
                raise InvalidAdapter(
                    f"Tensor {name!r} replaces the base's {site!r}; only low-rank changes can be served.",
                    param=name,
                )

    def _observe(self, tier: str, start: float, digest: str, nbytes: int) -> None:
        self.observations += [
            ("adapter_load_seconds", tier, time.perf_counter() - start),
            ("adapter_load_bytes", tier, nbytes),
        ]
        with self._lock:
            self.sources[digest] = tier
            if len(self.sources) > SOURCES:
                self.sources.popitem(last=False)


def check_identity(manifest: Manifest) -> None:
    content = (manifest.method, manifest.base_digest, manifest.config, manifest.weights.sha256)
    if content_digest(*content) != manifest.digest:
        raise StoreError("The adapter's manifest does not match its own digest.")


def _step_aside() -> None:
    """This thread yields to the engine's: lower priority where the system lets a thread have its own."""
    use_one_thread()
    with contextlib.suppress(OSError, AttributeError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
