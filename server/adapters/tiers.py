"""The tiers below the device: host RAM and local disk. Each is an LRU with a byte budget and no opinion
about what it holds. Both are used from the loader's threads; each locks itself.
"""

import os
from collections import OrderedDict
from pathlib import Path
from threading import Lock
from typing import Generic, Protocol, TypeVar


class Sized(Protocol):
    @property
    def nbytes(self) -> int: ...


T = TypeVar("T", bound=Sized)


class RamTier(Generic[T]):
    """Packed adapters by digest. What exceeds the whole budget is not kept."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.nbytes = 0
        self.evictions = 0
        self._held: OrderedDict[str, T] = OrderedDict()  # least recently used first
        self._lock = Lock()

    def __len__(self) -> int:
        return len(self._held)

    def get(self, digest: str) -> T | None:
        with self._lock:
            if found := self._held.get(digest):
                self._held.move_to_end(digest)
            return found

    def add(self, digest: str, item: T) -> None:
        with self._lock:
            if digest in self._held or item.nbytes > self.budget:
                return
            self._held[digest] = item
            self.nbytes += item.nbytes
            while self.nbytes > self.budget:
                _oldest, dropped = self._held.popitem(last=False)
                self.nbytes -= dropped.nbytes
                self.evictions += 1

    def drop(self, digest: str) -> None:
        with self._lock:
            if dropped := self._held.pop(digest, None):
                self.nbytes -= dropped.nbytes


class DiskTier:
    """Blobs by SHA-256, as files of that name; survives restarts, so every read is verified by its reader.

    A file that is being read when it is evicted stays readable until it is closed.
    """

    def __init__(self, folder: Path, budget: int) -> None:
        self.folder = folder
        self.budget = budget
        self.nbytes = 0
        self.evictions = 0
        self._sizes: OrderedDict[str, int] = OrderedDict()  # least recently used first
        self._lock = Lock()
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        for path in sorted(folder.iterdir(), key=lambda p: p.stat().st_mtime):
            if len(path.name) == 64:
                self._sizes[path.name] = path.stat().st_size
                self.nbytes += path.stat().st_size
            else:
                path.unlink()  # a draft of a download that was cut
        self._shrink()

    def __len__(self) -> int:
        return len(self._sizes)

    def path(self, sha256: str) -> Path:
        """Where the blob lies, or would."""
        return self.folder / sha256

    def has(self, sha256: str) -> bool:
        with self._lock:
            if sha256 not in self._sizes:
                return False
            self._sizes.move_to_end(sha256)
        if not self.path(sha256).exists():  # somebody cleaned up by hand
            self.drop(sha256)
            return False
        os.utime(self.path(sha256))  # the order survives a restart
        return True

    def add(self, sha256: str) -> None:
        """The file has just appeared at `path`."""
        with self._lock:
            if sha256 not in self._sizes:
                self._sizes[sha256] = self.path(sha256).stat().st_size
                self.nbytes += self._sizes[sha256]
            self._shrink()

    def drop(self, sha256: str) -> None:
        with self._lock:
            self.nbytes -= self._sizes.pop(sha256, 0)
            self.path(sha256).unlink(missing_ok=True)

    def _shrink(self) -> None:
        while self.nbytes > self.budget and len(self._sizes) > 1:
            oldest, size = self._sizes.popitem(last=False)
            self.nbytes -= size
            self.evictions += 1
            self.path(oldest).unlink(missing_ok=True)
