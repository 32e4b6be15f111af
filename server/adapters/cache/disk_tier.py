"""The tier on the local disk: copies of blobs from the object store, under one lock."""

import logging
import os
import secrets
import shutil
from pathlib import Path
from threading import Lock

from adapters_store.object_store.atomic_files import read_into
from server.adapters.cache.entries import Entry
from server.adapters.cache.eviction_policy import FROM_STORE, FairShares
from server.adapters.cache.tier_index import TierIndex

HEX = frozenset("0123456789abcdef")
FREE_BYTES, FREE_SHARE = 256 << 20, 0.01  # of the disk, whichever is less: copies leave so much of it free
log = logging.getLogger(__name__)


class DiskTier:
    """Blobs by SHA-256, as files of that name. Survives restarts; every read is verified, so no write waits
    for the disk, and a file that was cut, changed or put there by somebody else is one that is not there.

    Files under other names are not ours and left alone, except the drafts of writes that were cut. Links are
    never followed. A disk that is full or broken is done without; while others fill it, copies make way.
    """

    def __init__(self, folder: Path, budget: int, shares: FairShares | None = None) -> None:
        self.folder = folder
        self.evictions = 0
        self.failures = 0  # reads and writes that the disk refused
        self.corrupt = 0  # copies that did not hash to their name
        self.index: TierIndex[Entry] = TierIndex(budget, FROM_STORE, shares or FairShares())
        self._lock = Lock()
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._take_stock()
        except OSError as error:
            self._failed("be opened", error)

    @property
    def nbytes(self) -> int:
        return self.index.nbytes

    def __len__(self) -> int:
        return len(self.index.entries)

    def path(self, sha256: str) -> Path:
        """Where the blob lies, or would."""
        return self.folder / sha256

    def touch(self, sha256: str, tenant: str) -> None:
        with self._lock:
            self.index.record_request(sha256, tenant)

    def read(self, sha256: str, buffer: memoryview) -> bool:
        """Fill `buffer`, which is as long as the blob, with what hashes to its name; False if there is none.

        A copy that does not is dropped, and counted.
        """
        with self._lock:
            entry = self.index.entries.get(sha256)
            if entry is None or entry.references:  # unknown, or still being written
                return False
        try:
            descriptor = os.open(self.path(sha256), os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            with open(descriptor, "rb", buffering=0) as file:  # noqa: PTH123 - a descriptor has no path
                whole = os.fstat(descriptor).st_size == len(buffer) and read_into(
                    buffer, file.readinto, sha256
                )
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
            if sha256 in self.index.entries:
                return True
            if self._spare() < len(data):
                return False
            gone = self.index.plan_eviction(tenant, len(data)) if len(data) <= self.index.max_bytes else None
            if gone is None or not self.index.should_admit(sha256, tenant, len(data), gone):
                return False
            for entry in gone:
                self._remove(entry.key)
            self.evictions += len(gone)
            self.index.add(Entry(sha256, tenant, len(data), references=1))
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
            if sha256 not in self.index.entries:  # dropped while it was being written
                _unlink(self.path(sha256))
                return False
            self.index.entries[sha256].references = 0
        return True

    def drop(self, sha256: str) -> None:
        with self._lock:
            self._remove(sha256)

    def give_way(self) -> None:
        """Remove copies, the oldest first, until the disk has some room for what is not a copy."""
        with self._lock:
            idle = [entry for entry in self.index.entries.values() if not entry.references]
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
        self.index.drop(sha256)
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
            if self.index.nbytes + size > self.index.max_bytes:
                _unlink(self.path(name))
            else:
                self.index.add(Entry(name, "", size))
        self.index.entries = dict(reversed(self.index.entries.items()))

    def _failed(self, what: str, error: OSError) -> None:
        self.failures += 1
        if self.failures & (self.failures - 1) == 0:  # the 1st, 2nd, 4th, ...: a full disk fails each time
            log.warning("The adapter cache on disk cannot %s (%s); doing without.", what, error.strerror)


def _unlink(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:  # a folder in our place, or a disk gone read-only: it counts for nothing
        log.warning("A file in the adapter cache cannot be removed: %s.", error.strerror)
