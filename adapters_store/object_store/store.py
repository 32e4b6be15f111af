"""Objects by key in a folder, in memory, or in S3, GCS, Azure: one set of calls over obstore.

Knows no tenants and no manifests; keys are built by the registry, never by a caller. Each call is a blocking
method (`get_sync`, for the engine's loader threads); the async method of that name (`get`) runs it on a
bounded set of threads. A missing object raises NotFound, any other failure StoreError.

Every call ends: requests have time-outs, retries a limit, transfers a deadline (see cloud.py). After several
failures in a row of a cloud's store, calls fail at once until it answers again (see circuit_breaker.py).
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

from adapters_store.object_store import streams
from adapters_store.object_store.circuit_breaker import CircuitBreaker
from adapters_store.object_store.cloud import BULK_SECONDS, Clients, open_cloud, read_options
from adapters_store.object_store.streams import DAMAGED, chunks_of, verified, within_deadline
from server import atomic_files
from server.errors import CorruptObject, NotFound, StartupError, StoreError, TooLarge, disk_error, shown

T = TypeVar("T")
CHUNK_BYTES = 4 << 20
PART_BYTES = 8 << 20  # of a part of a multipart upload
CONCURRENT_PARTS = 3
MAX_GET_BYTES = 64 << 20  # `get` is for manifests and other small objects; weights take `download` or `read`
MAX_THREADS = 16  # for small calls, and as many again for transfers
MAX_CREATE_ATTEMPTS = 3
WRITER_ATTRIBUTE = "writer"  # of an object: the token of the call that created it
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
        self._folder = folder  # of a file:// store, which atomic_files.py reads and writes
        self._threads = anyio.CapacityLimiter(MAX_THREADS)
        self._transfers = anyio.CapacityLimiter(MAX_THREADS)

    @classmethod
    def open(
        cls, url: str, config: Path | None = None, options: Mapping[str, str] | None = None
    ) -> "Objects":
        """`config` is a file of options for obstore, `options` come on top of it; see cloud.py.

        Opens no connection. Raises StartupError for a URL that names no store.
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
            merged = (read_options(config) if config else {}) | dict(options or {})
            return cls(open_cloud(url, merged), None, remote=True)
        except (BaseError, OSError, ValueError) as error:
            raise StartupError(f"The store {shown(url)} cannot be opened as configured.") from error

    def self_test(self) -> None:
        """Write, read and remove a test object. Raises StoreError if that fails.

        Raises StartupError for a store where `create` overwrites an object: versions would not be immutable.
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

    def on_same_disk(self, folder: Path) -> bool:
        """Whether objects are files on the disk of `folder`; False for a folder that does not exist."""
        if self._folder is None or not folder.exists():
            return False
        return self._folder.stat().st_dev == folder.stat().st_dev

    # blocking calls

    def put_sync(self, key: str, source: Path | bytes, sha256: str | None = None) -> None:
        """Write the object atomically, replacing any. Raises StoreError if the digest is not `sha256`."""
        chunks = verified(chunks_of(source, CHUNK_BYTES), sha256)
        with self._call("put"):
            path = _checked(key)
            if self._folder:
                atomic_files.write_file(self._folder / path, chunks)
            elif isinstance(source, bytes) or source.stat().st_size <= PART_BYTES:
                obstore.put(self._bulk, path, b"".join(chunks), use_multipart=False)
            else:
                parts = within_deadline(chunks, BULK_SECONDS)
                obstore.put(self._bulk, path, parts, chunk_size=PART_BYTES, max_concurrency=CONCURRENT_PARTS)

    def create_sync(self, key: str, data: bytes) -> bool:
        """Write the object if there is none, else False. One of several concurrent calls gets True."""
        with self._call("create"):
            if self._folder:
                return atomic_files.write_file(self._folder / _checked(key), [data], only_if_absent=True)
            return self._create(_checked(key), data)

    def get_sync(self, key: str) -> bytes:
        """The content. Raises NotFound; TooLarge over MAX_GET_BYTES."""
        with self._call("get"):
            if self._folder:
                return streams.read_file(self._folder / _checked(key), MAX_GET_BYTES)
            found = obstore.get(self._quick, _checked(key))
            if found.meta["size"] > MAX_GET_BYTES:
                raise TooLarge(f"A stored object has {found.meta['size']} bytes, more than {MAX_GET_BYTES}.")
            return found.bytes().to_bytes()

    def download_sync(self, key: str, path: Path, sha256: str | None) -> None:
        """Stream the object to `path`, which appears complete and durable. Raises CorruptObject, NotFound."""
        with self._call("download"):
            found = obstore.get(self._bulk, _checked(key))
            chunks = (bytes(chunk) for chunk in found.stream(min_chunk_size=CHUNK_BYTES))
            atomic_files.write_file(path, verified(within_deadline(chunks, BULK_SECONDS), sha256))

    def read_sync(self, key: str, buffer: memoryview, sha256: str) -> None:
        """Fill `buffer`. Raises CorruptObject if the object's length or digest is another; NotFound."""
        with self._call("read"):
            if self._folder:
                with (self._folder / _checked(key)).open("rb", buffering=0) as file:
                    same_size = os.fstat(file.fileno()).st_size == len(buffer)
                    if not same_size or not streams.read_into(buffer, file.readinto, sha256):
                        raise CorruptObject(DAMAGED)
                return
            found, filled = obstore.get(self._bulk, _checked(key)), 0
            if found.meta["size"] != len(buffer):
                raise CorruptObject(DAMAGED)
            chunks = map(bytes, found.stream(min_chunk_size=CHUNK_BYTES))
            for chunk in verified(within_deadline(chunks, BULK_SECONDS), sha256):
                buffer[filled : filled + len(chunk)] = chunk
                filled += len(chunk)

    def head_sync(self, key: str) -> Head:
        """Size and time of the object. Raises NotFound."""
        with self._call("head"):
            meta = obstore.head(self._quick, _checked(key))
            return Head(meta["size"], meta["last_modified"].timestamp())

    def delete_sync(self, key: str) -> None:
        """Remove the object, if it exists."""
        with self._call("delete"):
            if self._folder:
                atomic_files.remove_file(self._folder / _checked(key))
            else:
                obstore.delete(self._quick, _checked(key))

    def list_sync(self, prefix: str) -> list[str]:
        """Every key under `prefix`, which ends at a path segment; sorted."""
        with self._call("list"):
            batches = obstore.list(self._quick, _checked(prefix.rstrip("/")), chunk_size=1000)
            return sorted(meta["path"] for batch in batches for meta in batch)

    def sign_put_sync(self, key: str, seconds: int) -> str:
        """A URL that allows its holder to PUT this one object, for `seconds`. Only if `remote`."""
        assert isinstance(self._bulk, S3Store | GCSStore | AzureStore), "callers look at `remote` first"
        with self._call("sign_put"):
            return obstore.sign(self._bulk, "PUT", _checked(key), timedelta(seconds=seconds))

    # the same calls for an event loop

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

    async def _on_thread(self, call: Callable[[], T]) -> T:
        return await run_sync(call, limiter=self._threads)

    def _create(self, key: str, data: bytes) -> bool:
        """Whether this call created the object: its token in the stored object decides, not the answer.

        After a lost answer, a retry (obstore's own included) finds the object that it wrote itself. And S3
        answers concurrent writers with a conflict, which obstore reports as "exists" where nothing may be.
        """
        token = secrets.token_hex(16)
        for _ in range(MAX_CREATE_ATTEMPTS):
            failure: BaseError | None = None
            try:
                obstore.put(self._quick, key, data, mode="create", attributes={WRITER_ATTRIBUTE: token})
                return True
            except AlreadyExistsError:
                log.debug("Created before: %s", key)
            except BaseError as error:
                failure = error
            try:
                return obstore.get(self._quick, key).attributes.get(WRITER_ATTRIBUTE) == token
            except FileNotFoundError:
                if failure is not None:
                    raise failure from None
        raise StoreError("Several writers were in each other's way; try again.")

    @contextmanager
    def _call(self, operation: str) -> Iterator[None]:
        """Translate failures into our errors, without the store's address or answer in the message."""
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
            if self.breaker.leave(probe, succeeded=answered):
                log.error("The object store is given up for a while; the breaker is open")
            self.on_call(operation, time.perf_counter() - start, outcome)


def _checked(key: str) -> str:
    """`key`, if it stays under the prefix. ValueError is a bug of ours: callers' names are checked before."""
    plain = key.isascii() and key.isprintable() and not set(key) & set("\\#%?*")
    if not plain or {"", ".", ".."} & set(key.split("/")):
        raise ValueError(f"not an object key: {key!r}")
    return key


def _first_line(error: Exception) -> str:
    """The first line of obstore's message has the kind, request and answer, but no keys or signatures."""
    return (str(error).splitlines() or [""])[0][:300]


def sha256_of(path: Path) -> str:
    """The digest of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
