"""The tiers below the device: host RAM and local disk. What makes way in them, tier_index.py says.

Both are used from the loader's threads and the engine's; each locks itself.
"""

import logging
import os
import secrets
import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from threading import Condition, Lock
from typing import Generic, Protocol, TypeVar

from adapters_store.object_store.atomic_files import fill
from server.adapters.cache.eviction_policy import FROM_DISK, FROM_STORE
from server.adapters.cache.share import Shares
from server.adapters.cache.tier_index import Entry, Shelf
from server.errors import StoreError

HEX = frozenset("0123456789abcdef")
FREE_BYTES, FREE_SHARE = 256 << 20, 0.01  # of the disk, whichever is less: copies leave so much of it free
log = logging.getLogger(__name__)


class Sized(Protocol):
    @property
    def nbytes(self) -> int: ...


T = TypeVar("T", bound=Sized)


@dataclass(eq=False)
class Held(Entry, Generic[T]):
    item: T | None = None  # None: room for a load under way


class RamTier(Generic[T]):
    """Packed adapters by digest, and the room that loads under way have reserved: both within the budget.

    Somebody who waits for an adapter claims it; claimed ones stay. Claims may come before the adapter does.
    """

    def __init__(self, budget: int, shares: Shares | None = None) -> None:
        self.evictions = 0
        self.shelf: Shelf[Held[T]] = Shelf(budget, FROM_DISK, shares or Shares())
        self._claims: Counter[str] = Counter()
        self._changed = Condition()
        self._closed = False

    @property
    def nbytes(self) -> int:
        return self.shelf.nbytes

    @property
    def budget(self) -> int:
        return self.shelf.budget

    def __len__(self) -> int:
        return len(self.shelf.entries)

    def get(self, digest: str) -> T | None:
        with self._changed:
            found = self.shelf.entries.get(digest)
            return found.item if found else None

    def touch(self, digest: str, tenant: str) -> None:
        with self._changed:
            self.shelf.touch(digest, tenant)

    def claim(self, digest: str) -> None:
        """Keep the adapter, or what is to become of its load, until `release`."""
        with self._changed:
            self._claims[digest] += 1
            self._pin(digest)

    def release(self, digest: str) -> None:
        with self._changed:
            assert self._claims[digest] > 0, "a claim is given up once"
            self._claims[digest] -= 1
            if not self._claims[digest]:
                del self._claims[digest]
            self._pin(digest)

    def reserve(self, digest: str, tenant: str, nbytes: int) -> None:
        """Room for a load, waiting for others to end if need be. `fill` or `give_up` ends it.

        Raises StoreError for a load that could never have it, and when the engine stops.
        """
        if nbytes > self.budget:
            raise StoreError(
                f"Loading the adapter takes {nbytes} bytes of host memory; all adapters share {self.budget}."
            )
        with self._changed:
            while not self._closed:
                gone = self.shelf.room(tenant, nbytes)
                if gone is not None:
                    for entry in gone:
                        self.shelf.drop(entry.key)
                    self.evictions += len(gone)
                    self.shelf.add(Held(digest, tenant, nbytes, pins=1))
                    return
                self._changed.wait()
            raise StoreError("The engine is stopping.")

    def fill(self, digest: str, item: T, extra: int = 0) -> None:
        """The load is done: the room is now the item's, and that of `extra` bytes which are still in use."""
        with self._changed:
            self.shelf.entries[digest].item = item
            self.shelf.resize(digest, item.nbytes + extra)
            self._pin(digest)

    def trim(self, digest: str, item: T) -> None:
        """Nothing extra is in use any more."""
        with self._changed:
            entry = self.shelf.entries.get(digest)
            if entry is not None and entry.item is item:  # neither forgotten nor loaded anew
                self.shelf.resize(digest, item.nbytes)
                self._changed.notify_all()

    def give_up(self, digest: str) -> None:
        """The load failed."""
        with self._changed:
            self.shelf.drop(digest)
            self._changed.notify_all()

    def drop(self, digest: str) -> None:
        """A load under way goes on: its memory is in use, and nobody asks for its outcome."""
        with self._changed:
            self.shelf.asked.forget(digest)
            if (entry := self.shelf.entries.get(digest)) and entry.item is not None:
                self.shelf.drop(digest)
                self._changed.notify_all()

    def close(self) -> None:
        """Nobody waits for room any more."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _pin(self, digest: str) -> None:
        if (entry := self.shelf.entries.get(digest)) and entry.item is not None:
            entry.pins = self._claims.get(digest, 0)
        self._changed.notify_all()


class DiskTier:
    """Blobs by SHA-256, as files of that name. Survives restarts; every read is verified, so no write waits
    for the disk, and a file that was cut, changed or put there by somebody else is one that is not there.

    Files under other names are not ours and left alone, except the drafts of writes that were cut. Links are
    never followed. A disk that is full or broken is done without; while others fill it, copies make way.
    """

    def __init__(self, folder: Path, budget: int, shares: Shares | None = None) -> None:
        self.folder = folder
        self.evictions = 0
        self.failures = 0  # reads and writes that the disk refused
        self.corrupt = 0  # copies that did not hash to their name
        self.shelf: Shelf[Entry] = Shelf(budget, FROM_STORE, shares or Shares())
        self._lock = Lock()
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._take_stock()
        except OSError as error:
            self._failed("be opened", error)

    @property
    def nbytes(self) -> int:
        return self.shelf.nbytes

    def __len__(self) -> int:
        return len(self.shelf.entries)

    def path(self, sha256: str) -> Path:
        """Where the blob lies, or would."""
        return self.folder / sha256

    def touch(self, sha256: str, tenant: str) -> None:
        with self._lock:
            self.shelf.touch(sha256, tenant)

    def read(self, sha256: str, buffer: memoryview) -> bool:
        """Fill `buffer`, which is as long as the blob, with what hashes to its name; False if there is none.

        A copy that does not is dropped, and counted.
        """
        with self._lock:
            entry = self.shelf.entries.get(sha256)
            if entry is None or entry.pins:  # unknown, or still being written
                return False
        try:
            descriptor = os.open(self.path(sha256), os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            with open(descriptor, "rb", buffering=0) as file:  # noqa: PTH123 - a descriptor has no path
                whole = os.fstat(descriptor).st_size == len(buffer) and fill(buffer, file.readinto, sha256)
            if whole:
                os.utime(self.path(sha256))  # the order survives a restart
                return True
            self.corrupt += 1
        except FileNotFoundError:
            pass  # evicted this very moment, or somebody cleaned up by hand
        except OSError as error:
            self._failed("read", error)
        self.drop(sha256)
        return False

    def write(self, sha256: str, tenant: str, data: memoryview) -> bool:
        """Keep a copy if it is worth its room; False if there is none now."""
        with self._lock:
            if sha256 in self.shelf.entries:
                return True
            if self._spare() < len(data):
                return False
            gone = self.shelf.room(tenant, len(data)) if len(data) <= self.shelf.budget else None
            if gone is None or not self.shelf.deserves(sha256, tenant, len(data), gone):
                return False
            for entry in gone:
                self._remove(entry.key)
            self.evictions += len(gone)
            self.shelf.add(Entry(sha256, tenant, len(data), pins=1))
        draft = self.folder / f"{sha256}#{secrets.randbits(63)}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)  # there may have been no room for it
            with draft.open("xb", buffering=0) as file:
                while data:
                    data = data[file.write(data) :]
            draft.replace(self.path(sha256))
        except OSError as error:
            self._failed("write", error)
            self.drop(sha256)
            _unlink(draft)
            return False
        with self._lock:
            if sha256 not in self.shelf.entries:  # dropped while it was being written
                _unlink(self.path(sha256))
                return False
            self.shelf.entries[sha256].pins = 0
        return True

    def drop(self, sha256: str) -> None:
        with self._lock:
            self._remove(sha256)

    def give_way(self) -> None:
        """Remove copies, the oldest first, until the disk has some room for what is not a copy."""
        with self._lock:
            idle = [entry for entry in self.shelf.entries.values() if not entry.pins]
            spare = self._spare() if idle else 0
            for entry in idle:
                if spare >= 0:
                    return
                self._remove(entry.key)
                self.evictions += 1
                spare += entry.nbytes

    def _spare(self) -> float:
        """Bytes of the disk that copies may still take; negative: that they should give back."""
        try:
            disk = shutil.disk_usage(self.folder)
        except OSError:  # there is no folder yet
            return float("inf")
        return disk.free - min(FREE_BYTES, FREE_SHARE * disk.total)

    def _remove(self, sha256: str) -> None:
        self.shelf.drop(sha256)
        _unlink(self.path(sha256))

    def _take_stock(self) -> None:
        """What an earlier run left, the least recently used first; what is over the budget goes."""
        found = []
        for item in os.scandir(self.folder):
            name, _, draft = item.name.partition("#")
            if len(name) != 64 or set(name) - HEX:
                continue
            if draft or item.is_symlink():
                _unlink(Path(item.path))
            elif item.is_file(follow_symlinks=False):
                stat = item.stat(follow_symlinks=False)
                found.append((stat.st_mtime, name, stat.st_size))
        for _, name, size in sorted(found, reverse=True):
            if self.shelf.nbytes + size > self.shelf.budget:
                _unlink(self.path(name))
            else:
                self.shelf.add(Entry(name, "", size))
        self.shelf.entries = dict(reversed(self.shelf.entries.items()))

    def _failed(self, what: str, error: OSError) -> None:
        self.failures += 1
        if self.failures & (self.failures - 1) == 0:  # the 1st, 2nd, 4th, ...: a full disk fails each time
            log.warning("The adapter cache on disk cannot %s (%s); doing without.", what, error.strerror)


def _unlink(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:  # a folder in our place, or a disk gone read-only: it counts for nothing
        log.warning("A file in the adapter cache cannot be removed: %s.", error.strerror)
