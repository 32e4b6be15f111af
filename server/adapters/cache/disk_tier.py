"""The tier on the local disk: copies of blobs from the object store, under one lock."""

import logging
import os
import shutil
from pathlib import Path
from threading import Lock

from adapters_store.object_store.streams import read_into
from server.adapters.cache.entries import Entry
from server.adapters.cache.eviction_policy import FROM_STORE, FairShares
from server.adapters.cache.tier_index import TierIndex
from server.atomic_files import write_file

HEX = frozenset("0123456789abcdef")
MIN_FREE_BYTES, MIN_FREE_PART = 256 << 20, 0.01  # of the disk, whichever is less: copies leave this free
log = logging.getLogger(__name__)


class DiskTier:
    """Blobs by SHA-256, as files of that name. The files survive restarts.

    Every read is verified, so writes need no fsync, and a truncated or changed file counts as absent. Files
    under other names are left alone, except temporary files of writes that were interrupted. Links are never
    followed. A full or broken disk is no error: nothing is kept then. While other files fill the disk, copies
    are removed.
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
            self._index_files()
        except OSError as error:
            self._failed("be opened", error)

    @property
    def nbytes(self) -> int:
        return self.index.nbytes

    def __len__(self) -> int:
        return len(self.index.entries)

    def path(self, sha256: str) -> Path:
        """The file of the blob, whether it exists or not."""
        return self.folder / sha256

    def touch(self, sha256: str, tenant: str) -> None:
        with self._lock:
            self.index.record_request(sha256, tenant)

    def read(self, sha256: str, buffer: memoryview) -> bool:
        """Fill `buffer`, which is as long as the blob; False if there is no copy, or a corrupt one.

        A corrupt copy is counted and removed.
        """
        with self._lock:
            entry = self.index.entries.get(sha256)
            if entry is None or entry.references:  # unknown, or still being written
                return False
        try:
            descriptor = os.open(self.path(sha256), os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            with open(descriptor, "rb", buffering=0) as file:  # noqa: PTH123 - a descriptor has no path
                has_size = os.fstat(descriptor).st_size == len(buffer)
                is_intact = has_size and read_into(buffer, file.readinto, sha256)
            if is_intact:
                os.utime(self.path(sha256))  # the order survives a restart
                return True
            self.corrupt += 1
        except FileNotFoundError:
            pass  # evicted this very moment, or removed by hand
        except OSError as error:
            self._failed("read", error)
        self.drop(sha256)
        return False

    def write(self, sha256: str, tenant: str, data: memoryview) -> bool:
        """Keep a copy if the disk has space and the index admits it; whether there is one now."""
        with self._lock:
            if sha256 in self.index.entries:
                return True
            if self._spare_bytes() < len(data):
                return False
            fits = len(data) <= self.index.max_bytes
            victims = self.index.plan_eviction(tenant, len(data)) if fits else None
            if victims is None or not self.index.should_admit(sha256, tenant, len(data), victims):
                return False
            for entry in victims:
                self._remove(entry.key)
            self.evictions += len(victims)
            self.index.add(Entry(sha256, tenant, len(data), references=1))
        try:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)  # it may have been full at the start
            write_file(self.path(sha256), [data], durable=False)
        except OSError as error:
            self._failed("write", error)
            self.drop(sha256)
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

    def free_disk_space(self) -> None:
        """Remove copies, oldest first, until the disk has its minimum of free space."""
        with self._lock:
            idle = [entry for entry in self.index.entries.values() if not entry.references]
            spare = self._spare_bytes() if idle else 0
            for entry in idle:
                if spare >= 0:
                    return
                self._remove(entry.key)
                self.evictions += 1
                spare += entry.nbytes

    def _spare_bytes(self) -> float:
        """Bytes of the disk that copies may still take; negative if copies must be removed."""
        try:
            disk = shutil.disk_usage(self.folder)
        except OSError:  # there is no folder yet
            return float("inf")
        return disk.free - min(MIN_FREE_BYTES, MIN_FREE_PART * disk.total)

    def _remove(self, sha256: str) -> None:
        self.index.drop(sha256)
        _unlink(self.path(sha256))

    def _index_files(self) -> None:
        """Index the files of an earlier run, least recently used first; remove those over the budget."""
        files = []
        for item in os.scandir(self.folder):
            name, _, temp = item.name.partition("#")
            if len(name) != 64 or set(name) - HEX:
                continue
            if temp or item.is_symlink():
                _unlink(Path(item.path))
            elif item.is_file(follow_symlinks=False):
                stat = item.stat(follow_symlinks=False)
                files.append((stat.st_mtime, name, stat.st_size))
        for _, name, size in sorted(files, reverse=True):
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
    except OSError as error:  # a folder of that name, or a read-only disk: no error
        log.warning("A file in the adapter cache cannot be removed: %s.", error.strerror)
