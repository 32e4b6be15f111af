"""The tier in host RAM. Many threads use it: one lock guards its index and eviction policy."""

import logging
from collections import Counter
from dataclasses import dataclass
from threading import Condition
from typing import Generic, Protocol, TypeVar

from server.adapters.cache.entries import Entry
from server.adapters.cache.eviction_policy import FROM_DISK, FairShares
from server.adapters.cache.tier_index import TierIndex
from server.errors import StoreError

log = logging.getLogger(__name__)


class Sized(Protocol):
    @property
    def nbytes(self) -> int: ...


T = TypeVar("T", bound=Sized)


@dataclass(eq=False)
class RamEntry(Entry, Generic[T]):
    item: T | None = None  # None: memory reserved for a load under way


class RamTier(Generic[T]):
    """Packed adapters by digest, and the memory that running loads have reserved, both within the budget.

    A claimed adapter is not evicted. It may be claimed before it is loaded.
    """

    def __init__(self, budget: int, shares: FairShares | None = None) -> None:
        self.evictions = 0
        self.index: TierIndex[RamEntry[T]] = TierIndex(budget, FROM_DISK, shares or FairShares())
        self._claims: Counter[str] = Counter()
        self._changed = Condition()
        self._closed = False

    @property
    def nbytes(self) -> int:
        return self.index.nbytes

    @property
    def budget(self) -> int:
        return self.index.max_bytes

    def __len__(self) -> int:
        return len(self.index.entries)

    def get(self, digest: str) -> T | None:
        with self._changed:
            found = self.index.entries.get(digest)
            return found.item if found else None

    def touch(self, digest: str, tenant: str) -> None:
        with self._changed:
            self.index.record_request(digest, tenant)

    def claim(self, digest: str) -> None:
        """Keep the adapter, now or once it is loaded, until `release`."""
        with self._changed:
            self._claims[digest] += 1
            self._update_references(digest)

    def release(self, digest: str) -> None:
        with self._changed:
            assert self._claims[digest] > 0, "a claim is released once"
            self._claims[digest] -= 1
            if not self._claims[digest]:
                del self._claims[digest]
            self._update_references(digest)

    def reserve(self, digest: str, tenant: str, nbytes: int) -> None:
        """Reserve memory for a load, waiting for other loads to end if need be. `insert` or `cancel` ends it.

        Raises StoreError for a load over the whole budget, and when the engine stops.
        """
        if nbytes > self.budget:
            raise StoreError(
                f"Loading the adapter takes {nbytes} bytes of host memory; all adapters share {self.budget}."
            )
        with self._changed:
            while not self._closed:
                victims = self.index.plan_eviction(tenant, nbytes)
                if victims is not None:
                    for entry in victims:
                        self.index.drop(entry.key)
                    self.evictions += len(victims)
                    self.index.add(RamEntry(digest, tenant, nbytes, references=1))
                    return
                self._changed.wait()
            raise StoreError("The engine is stopping.")

    def insert(self, digest: str, item: T, extra: int = 0) -> None:
        """Store the loaded item; its reservation shrinks to its bytes and `extra` ones still in use."""
        with self._changed:
            self.index.entries[digest].item = item
            self.index.shrink(digest, item.nbytes + extra)
            self._update_references(digest)

    def trim(self, digest: str, item: T) -> None:
        """Shrink the reservation to the item: the extra bytes are free."""
        with self._changed:
            entry = self.index.entries.get(digest)
            if entry is not None and entry.item is item:  # neither forgotten nor loaded anew
                self.index.shrink(digest, item.nbytes)
                self._changed.notify_all()

    def cancel(self, digest: str) -> None:
        """Drop the reservation of a load that failed."""
        with self._changed:
            self.index.drop(digest)
            self._changed.notify_all()

    def drop(self, digest: str) -> None:
        """Remove the adapter. A running load keeps its reservation, since its memory is in use."""
        with self._changed:
            self.index.policy.frequency.forget(digest)
            if (entry := self.index.entries.get(digest)) and entry.item is not None:
                self.index.drop(digest)
                self._changed.notify_all()

    def close(self) -> None:
        """End all waits for memory with StoreError."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _update_references(self, digest: str) -> None:
        if (entry := self.index.entries.get(digest)) and entry.item is not None:
            entry.references = self._claims.get(digest, 0)
        self._changed.notify_all()
