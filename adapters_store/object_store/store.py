"""Objects by key in a folder, in memory, or in S3, GCS, Azure: one set of calls over obstore.

Knows no tenants and no manifests; keys are made by the registry, never by a caller. Every call exists
once, as a blocking method (`get_sync`, for the engine's loader thread); its async twin (`get`) runs that
on a bounded set of threads. A missing object is NotFound; everything else that goes wrong is StoreError.

Every call ends: requests have time-outs, retries a limit, transfers a deadline (see cloud.py). When a cloud's
store has failed several times in a row, calls fail at once until it answers again (see circuit_breaker.py).
"""

import hashlib
import logging
import os
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Literal, NamedTuple, TypeVar
from urllib.parse import urlsplit
from urllib.request import url2pathname

import anyio
import obstore
from anyio.to_thread import run_sync
from obstore.exceptions import AlreadyExistsError, BaseError
from obstore.store import AzureStore, GCSStore, LocalStore, MemoryStore, S3Store

from adapters_store.object_store import atomic_files
from adapters_store.object_store.atomic_files import chunks_of, within_deadline
from adapters_store.object_store.circuit_breaker import CircuitBreaker
from adapters_store.object_store.cloud import BULK_SECONDS, Clients, open_cloud, read_options
from server.errors import CorruptObject, NotFound, StartupError, StoreError, TooLarge, disk_error, shown

T = TypeVar("T")
CHUNK = 4 << 20  # bytes
PART = 8 << 20  # bytes of a part of a multipart upload, of which PARTS are on their way at a time
PARTS = 3
MAX_GET = 64 << 20  # bytes; `get` is for manifests and other small things, weights go through `download`
THREADS = 16  # for small calls, and as many for transfers
CREATE_TRIES = 3
WRITER = "writer"  # an attribute: the token of the call that created the object
SCHEMES = ("file", "memory", "s3", "gs", "az")
log = logging.getLogger(__name__)

Outcome = Literal["done", "missing", "failed", "refused"]  # refused: the breaker was open
OnCall = Callable[[str, float, Outcome], None]  # operation, seconds, outcome; called on any thread


class Head(NamedTuple):
    bytes: int
    modified: float  # Unix seconds


class Objects:
    """One store, under one prefix that no key can leave."""

    def __init__(self, clients: Clients, folder: Path | None, *, remote: bool) -> None:
        self.breaker = CircuitBreaker() if remote else CircuitBreaker(failures=None)
        self.on_call: OnCall = lambda _operation, _seconds, _outcome: None
        self.remote = remote
        self._quick, self._bulk = clients
        self._folder = folder  # of a file:// store, whose writes are ours: see atomic_files.py
        self._threads = anyio.CapacityLimiter(THREADS)
        self._transfers = anyio.CapacityLimiter(THREADS)

    @classmethod
    def open(
        cls, url: str, config: Path | None = None, options: Mapping[str, str] | None = None
    ) -> "Objects":
        """`config` is a file of options for obstore, `options` are more of them; see cloud.py.

        Touches no network. Raises StartupError for a URL that names no store.
        """
        parts = urlsplit(url)
        if "@" in parts.netloc:
            raise StartupError("store must not hold credentials: put them into the file of store_config.")
        if parts.scheme not in SCHEMES or (parts.scheme == "file" and parts.netloc):
            raise StartupError(f"store must be a URL like file:///folder or s3://bucket, not {shown(url)}.")
        try:
            if parts.scheme == "file":
                folder = Path(url2pathname(parts.path))
                atomic_files.make_folder(folder)
                local = LocalStore(folder)
                return cls(Clients(local, local), folder, remote=False)
            if parts.scheme == "memory":
                memory = MemoryStore()
                return cls(Clients(memory, memory), None, remote=False)
            given = (read_options(config) if config else {}) | dict(options or {})
            return cls(open_cloud(url, given), None, remote=True)
        except (BaseError, OSError, ValueError) as error:
            raise StartupError(f"The store {shown(url)} cannot be opened as configured.") from error

    def prove_sync(self) -> None:
        """Write, read and remove an object of no meaning. StoreError if that fails.

        Raises StartupError for a store that lets a second `create` overwrite: no version would be safe there.
        """
        key = f"proof/{secrets.token_hex(8)}"
        created = [self.create_sync(key, data) for data in (b"first", b"second")]
        kept = self.get_sync(key) == b"first"
        self.delete_sync(key)
        if created != [True, False] or not kept:
            raise StartupError("store lacks conditional writes: it overwrites what must only be created.")

    @property
    def shared(self) -> bool:
        """Whether other processes see the same objects."""
        return self.remote or self._folder is not None

    def beside(self, folder: Path) -> bool:
        """Whether objects are files of the same disk as this folder; one that is missing is on none."""
        if self._folder is None or not folder.exists():
            return False
        return self._folder.stat().st_dev == folder.stat().st_dev

    # what the store does, blocking

    def put_sync(self, key: str, source: Path | bytes, sha256: str | None = None) -> None:
        """Write it, whole or not at all, replacing any; StoreError if the bytes are not `sha256`'s."""
        chunks = atomic_files.verified(chunks_of(source, CHUNK), sha256)
        with self._call("put"):
            if self._folder:
                atomic_files.write_file(self._folder / _checked(key), chunks)
            elif isinstance(source, bytes) or source.stat().st_size <= PART:
                obstore.put(self._bulk, _checked(key), b"".join(chunks), use_multipart=False)
            else:
                parts = within_deadline(chunks, BULK_SECONDS)
                obstore.put(self._bulk, _checked(key), parts, chunk_size=PART, max_concurrency=PARTS)

    def create_sync(self, key: str, data: bytes) -> bool:
        """Write the object if there is none; False if there is. Of many at once exactly one gets True."""
        with self._call("create"):
            if self._folder:
                return atomic_files.write_file(self._folder / _checked(key), [data], only_if_absent=True)
            return self._create(_checked(key), data)

    def get_sync(self, key: str) -> bytes:
        """The whole object; TooLarge over MAX_GET bytes."""
        with self._call("get"):
            if self._folder:
                return atomic_files.read_file(self._folder / _checked(key), MAX_GET)
            found = obstore.get(self._quick, _checked(key))
            if found.meta["size"] > MAX_GET:
                raise TooLarge(f"A stored object has {found.meta['size']} bytes, more than {MAX_GET}.")
            return found.bytes().to_bytes()

    def download_sync(self, key: str, path: Path, sha256: str | None) -> None:
        """Stream the object to `path`, which appears once every byte is there, on disk, and `sha256`'s."""
        with self._call("download"):
            found = obstore.get(self._bulk, _checked(key))
            chunks = (bytes(chunk) for chunk in found.stream(min_chunk_size=CHUNK))
            atomic_files.write_file(path, within_deadline(chunks, BULK_SECONDS), sha256)

    def read_sync(self, key: str, buffer: memoryview, sha256: str) -> None:
        """Fill `buffer`, which is as long as the object; CorruptObject if they are not `sha256`'s."""
        with self._call("read"):
            if self._folder:
                with (self._folder / _checked(key)).open("rb", buffering=0) as file:
                    same = os.fstat(file.fileno()).st_size == len(buffer)
                    if not same or not atomic_files.read_into(buffer, file.readinto, sha256):
                        raise CorruptObject(atomic_files.DAMAGED)
                return
            found, at = obstore.get(self._bulk, _checked(key)), 0
            if found.meta["size"] != len(buffer):
                raise CorruptObject(atomic_files.DAMAGED)
            chunks = map(bytes, found.stream(min_chunk_size=CHUNK))
            for chunk in atomic_files.verified(within_deadline(chunks, BULK_SECONDS), sha256):
                buffer[at : at + len(chunk)] = chunk
                at += len(chunk)

    def head_sync(self, key: str) -> Head:
        with self._call("head"):
            meta = obstore.head(self._quick, _checked(key))
            return Head(meta["size"], meta["last_modified"].timestamp())

    def delete_sync(self, key: str) -> None:
        """Nothing happens if there is no such object."""
        with self._call("delete"):
            if self._folder:
                atomic_files.remove_file(self._folder / _checked(key))
            else:
                obstore.delete(self._quick, _checked(key))

    def list_sync(self, prefix: str) -> list[str]:
        """Every key under a prefix, which is whole path segments; sorted."""
        with self._call("list"):
            batches = obstore.list(self._quick, _checked(prefix.rstrip("/")), chunk_size=1000)
            return sorted(meta["path"] for batch in batches for meta in batch)

    def sign_put_sync(self, key: str, seconds: int) -> str:
        """A URL that whoever has it may PUT this one object to, for so many seconds. Only if `remote`."""
        assert isinstance(self._bulk, S3Store | GCSStore | AzureStore), "callers look at `remote` first"
        with self._call("sign_put"):
            return obstore.sign(self._bulk, "PUT", _checked(key), timedelta(seconds=seconds))

    # the same for callers on an event loop

    async def put(self, key: str, source: Path | bytes, sha256: str | None = None) -> None:
        await run_sync(self.put_sync, key, source, sha256, limiter=self._transfers)

    async def create(self, key: str, data: bytes) -> bool:
        return await self._on_thread(lambda: self.create_sync(key, data))

    async def get(self, key: str) -> bytes:
        return await self._on_thread(lambda: self.get_sync(key))

    async def download(self, key: str, path: Path, sha256: str | None) -> None:
        await run_sync(self.download_sync, key, path, sha256, limiter=self._transfers)

    async def head(self, key: str) -> Head:
        return await self._on_thread(lambda: self.head_sync(key))

    async def delete(self, key: str) -> None:
        await self._on_thread(lambda: self.delete_sync(key))

    async def list(self, prefix: str) -> list[str]:
        return await self._on_thread(lambda: self.list_sync(prefix))

    async def sign_put(self, key: str, seconds: int) -> str:
        return await self._on_thread(lambda: self.sign_put_sync(key, seconds))

    async def prove(self) -> None:
        await self._on_thread(self.prove_sync)

    async def _on_thread(self, call: Callable[[], T]) -> T:
        return await run_sync(call, limiter=self._threads)

    def _create(self, key: str, data: bytes) -> bool:
        """What the store says may be wrong in both directions, so what lies there decides: whose token is it?

        An answer that was lost makes a retry, obstore's own included, find the object it wrote itself. And
        S3 answers two writers at once with a conflict, which obstore takes for "exists" though nothing may.
        """
        token = secrets.token_hex(16)
        for _ in range(CREATE_TRIES):
            failure: BaseError | None = None
            try:
                obstore.put(self._quick, key, data, mode="create", attributes={WRITER: token})
                return True
            except AlreadyExistsError:
                log.debug("Created before: %s", key)
            except BaseError as error:
                failure = error
            try:
                return obstore.get(self._quick, key).attributes.get(WRITER) == token
            except FileNotFoundError:
                if failure is not None:
                    raise failure from None
        raise StoreError("Several writers were in each other's way; try again.")

    @contextmanager
    def _call(self, operation: str) -> Iterator[None]:
        """The store's failures as ours. The message says nothing of where it is or what it answered."""
        start, answered = time.perf_counter(), True
        outcome: Outcome = "done"
        try:
            probe = self.breaker.enter()
        except StoreError:
            self.on_call(operation, 0.0, "refused")
            raise
        try:
            yield
        except FileNotFoundError as error:
            outcome = "missing"
            raise NotFound("There is no such object in the store.") from error
        except (BaseError, OSError) as error:
            outcome, answered = "failed", not isinstance(error, BaseError)
            log.warning("The object store failed at %s: %s", operation, _first_line(error))
            failed = StoreError("The object store did not answer as it should; try again.")
            raise disk_error(error) or failed from error
        except Exception:
            outcome = "failed"
            raise
        finally:
            if self.breaker.leave(probe, answered):
                log.error("The object store is given up for a while; the breaker is open")
            self.on_call(operation, time.perf_counter() - start, outcome)


def _checked(key: str) -> str:
    """`key`, if it stays under the prefix. ValueError is our bug: callers' names never get here unchecked."""
    plain = key.isascii() and key.isprintable() and not set(key) & set("\\#%?*")
    if not plain or {"", ".", ".."} & set(key.split("/")):
        raise ValueError(f"not an object key: {key!r}")
    return key


def _first_line(error: Exception) -> str:
    """Of what obstore says: there the kind, the request and its answer stand; keys and signatures do not."""
    return (str(error).splitlines() or [""])[0][:300]


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
