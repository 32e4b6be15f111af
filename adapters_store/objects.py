"""Objects by key in a folder, in memory, or in S3, GCS, Azure: one set of calls over obstore.

Knows no tenants and no manifests; keys are made by the registry, never by a caller. Every call exists
once, as a blocking method (`get_sync`, for the engine's loader thread); its async twin (`get`) runs that
on a bounded set of threads. A missing object is NotFound; everything else that goes wrong is StoreError.
"""

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urlsplit
from urllib.request import url2pathname

import anyio
import obstore
from anyio.to_thread import run_sync
from obstore.exceptions import AlreadyExistsError, BaseError
from obstore.store import LocalStore, MemoryStore, ObjectStore, from_url

from adapters_store.durable import WrongBytes, fill, make_folder, remove_file, verified, write_file
from server.errors import NotFound, StartupError, StoreError, TooLarge, shown

T = TypeVar("T")
CHUNK = 4 << 20  # bytes
MAX_GET = 64 << 20  # bytes; `get` is for manifests and other small things, weights go through `download`
THREADS = 16

SCHEMES = ("file", "memory", "s3", "gs", "az")
CLIENT = {  # each read is bounded more tightly than the transfer: a large adapter may take its time
    "connect_timeout": timedelta(seconds=5),
    "read_timeout": timedelta(seconds=20),
    "timeout": timedelta(minutes=10),
}
RETRY = {  # the one layer of retries: exponential, capped, with jitter
    "max_retries": 4,
    "retry_timeout": timedelta(seconds=30),
    "backoff": {"init_backoff": timedelta(milliseconds=100), "max_backoff": timedelta(seconds=3)},
}


class Head(NamedTuple):
    bytes: int
    modified: float  # Unix seconds


class Objects:
    """One store, under one prefix that no key can leave."""

    def __init__(self, store: ObjectStore, folder: Path | None) -> None:
        self._store = store
        self._folder = folder  # of a file:// store, whose writes are ours: see durable.py
        self._threads = anyio.CapacityLimiter(THREADS)

    @classmethod
    def open(cls, url: str, **options: Any) -> "Objects":
        """`options` go to obstore (endpoint, ...); it reads the rest from the cloud's variables.

        Touches no network. Raises StartupError for a URL that names no store.
        """
        parts = urlsplit(url)
        if parts.scheme not in SCHEMES or (parts.scheme == "file" and parts.netloc):
            raise StartupError(f"store must be a URL like file:///folder or s3://bucket, not {shown(url)}.")
        try:
            if parts.scheme == "file":
                folder = Path(url2pathname(parts.path))
                make_folder(folder)
                return cls(LocalStore(folder), folder)
            if parts.scheme == "memory":
                return cls(MemoryStore(), None)
            return cls(_cloud({"url": url, "client_options": CLIENT, "retry_config": RETRY, **options}), None)
        except (BaseError, OSError, ValueError) as error:
            raise StartupError(f"The store {shown(url)} cannot be opened as configured.") from error

    # what the store does, blocking

    def put_sync(self, key: str, source: Path | bytes, sha256: str | None = None) -> None:
        """Write it, whole or not at all, replacing any; StoreError if the bytes are not `sha256`'s."""
        chunks = verified(_chunks(source), sha256)
        with _failures():
            if self._folder:
                write_file(self._folder / _checked(key), chunks)
            else:
                small = isinstance(source, bytes) or source.stat().st_size <= CHUNK
                obstore.put(self._store, _checked(key), b"".join(chunks) if small else chunks)

    def create_sync(self, key: str, data: bytes) -> bool:
        """Write the object if there is none; False if there is. Of many at once exactly one gets True."""
        with _failures():
            if self._folder:
                return write_file(self._folder / _checked(key), [data], only_if_absent=True)
            try:
                obstore.put(self._store, _checked(key), data, mode="create")
            except AlreadyExistsError:
                return False
            return True

    def get_sync(self, key: str) -> bytes:
        """The whole object; TooLarge over MAX_GET bytes."""
        with _failures():
            found = obstore.get(self._store, _checked(key))
            if found.meta["size"] > MAX_GET:
                raise TooLarge(f"A stored object has {found.meta['size']} bytes, more than {MAX_GET}.")
            return found.bytes().to_bytes()

    def download_sync(self, key: str, path: Path, sha256: str) -> None:
        """Stream the object to `path`, which appears once every byte is there, on disk, and `sha256`'s."""
        with _failures():
            found = obstore.get(self._store, _checked(key))
            write_file(path, (bytes(chunk) for chunk in found.stream(min_chunk_size=CHUNK)), sha256)

    def read_sync(self, key: str, buffer: memoryview, sha256: str) -> None:
        """Fill `buffer`, which is as long as the object; WrongBytes if they are not `sha256`'s."""
        with _failures():
            if self._folder:
                with (self._folder / _checked(key)).open("rb", buffering=0) as file:
                    same = os.fstat(file.fileno()).st_size == len(buffer)
                    if not same or not fill(buffer, file.readinto, sha256):
                        raise WrongBytes
                return
            found, at = obstore.get(self._store, _checked(key)), 0
            if found.meta["size"] != len(buffer):
                raise WrongBytes
            for chunk in verified(map(bytes, found.stream(min_chunk_size=CHUNK)), sha256):
                buffer[at : at + len(chunk)] = chunk
                at += len(chunk)

    def head_sync(self, key: str) -> Head:
        with _failures():
            meta = obstore.head(self._store, _checked(key))
            return Head(meta["size"], meta["last_modified"].timestamp())

    def delete_sync(self, key: str) -> None:
        """Nothing happens if there is no such object."""
        with _failures():
            if self._folder:
                remove_file(self._folder / _checked(key))
            else:
                obstore.delete(self._store, _checked(key))

    def list_sync(self, prefix: str) -> list[str]:
        """Every key under a prefix, which is whole path segments; sorted."""
        with _failures():
            batches = obstore.list(self._store, _checked(prefix.rstrip("/")), chunk_size=1000)
            return sorted(meta["path"] for batch in batches for meta in batch)

    # the same for callers on an event loop

    async def put(self, key: str, source: Path | bytes, sha256: str | None = None) -> None:
        await self._on_thread(lambda: self.put_sync(key, source, sha256))

    async def create(self, key: str, data: bytes) -> bool:
        return await self._on_thread(lambda: self.create_sync(key, data))

    async def get(self, key: str) -> bytes:
        return await self._on_thread(lambda: self.get_sync(key))

    async def download(self, key: str, path: Path, sha256: str) -> None:
        await self._on_thread(lambda: self.download_sync(key, path, sha256))

    async def head(self, key: str) -> Head:
        return await self._on_thread(lambda: self.head_sync(key))

    async def delete(self, key: str) -> None:
        await self._on_thread(lambda: self.delete_sync(key))

    async def list(self, prefix: str) -> list[str]:
        return await self._on_thread(lambda: self.list_sync(prefix))

    async def _on_thread(self, call: Callable[[], T]) -> T:
        return await run_sync(call, limiter=self._threads)


def _cloud(arguments: Any) -> ObjectStore:
    """obstore types `from_url` once per cloud; which one it is, only the URL says."""
    return from_url(**arguments)


def _checked(key: str) -> str:
    """`key`, if it stays under the prefix. ValueError is our bug: callers' names never get here unchecked."""
    plain = key.isascii() and key.isprintable() and not set(key) & set("\\#%?*")
    if not plain or {"", ".", ".."} & set(key.split("/")):
        raise ValueError(f"not an object key: {key!r}")
    return key


def _chunks(source: Path | bytes) -> Iterator[bytes]:
    if isinstance(source, bytes):
        yield source
        return
    with source.open("rb") as file:
        while chunk := file.read(CHUNK):
            yield chunk


@contextmanager
def _failures() -> Iterator[None]:
    """The store's failures as ours. The message says nothing of where the store is or what it answered."""
    try:
        yield
    except FileNotFoundError as error:
        raise NotFound("There is no such object in the store.") from error
    except (BaseError, OSError) as error:
        raise StoreError("The object store did not answer as it should; try again.") from error


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
