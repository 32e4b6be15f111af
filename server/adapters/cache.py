"""The device tier: which adapter sits in which slot. LRU, byte budget, pins. No torch, no I/O.

    loading  --put-->  resident, used (pins >= 1)  <-->  resident, idle (LRU order)  --evict-->  gone

A slot in use is never evicted. Everything happens on the engine's thread: the loader works elsewhere and
is polled through its futures.
"""

from collections import OrderedDict
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Protocol

from server.engine.messages import AdapterRef
from server.errors import PolypeftError, StoreError


class Loaded(Protocol):
    """What the loader brings: opaque here but for what it costs in bytes and in context."""

    @property
    def nbytes(self) -> int: ...
    @property
    def virtual(self) -> int: ...
    @property
    def given(self) -> bool: ...
    @property
    def summable(self) -> bool: ...


class Slots(Protocol):
    """The part of a bank that this file may touch."""

    def put(self, slot: int, packed: Any) -> None: ...
    def clear(self, slot: int) -> None: ...


class Fetcher(Protocol):
    def fetch(self, ref: AdapterRef) -> "Future[Any]": ...
    def forget(self, digest: str) -> None: ...


@dataclass
class Resident:
    digest: str
    method: str
    slot: int
    nbytes: int
    virtual: int = 0  # tokens it puts before each row
    given: bool = False  # their K/V need no computing
    summable: bool = False  # may be weighted, and added to others
    pins: int = 0
    forgotten: bool = False  # deleted while in use: goes with its last row


class AdapterCache:
    def __init__(self, banks: Mapping[str, Slots], loader: Fetcher, *, slots: int, budget: int) -> None:
        self.banks = banks
        self.loader = loader
        self.budget = budget
        self.slots = slots
        self.free = list(range(slots, 0, -1))  # slot 0 is "no adapter"
        self.by_digest: OrderedDict[str, Resident] = OrderedDict()  # least recently used first
        self.by_slot: dict[int, Resident] = {}
        self.pending: OrderedDict[str, Future[Any]] = OrderedDict()
        self.nbytes = 0
        self.hits = self.misses = self.evictions = self.failures = 0

    def acquire(self, ref: AdapterRef) -> int | None:
        """A pinned slot; None when the adapter is on its way, or all memory is pinned (try next step).

        Raises what ended the load; the next request tries it afresh.
        """
        if found := self.by_digest.get(ref.digest):
            self.by_digest.move_to_end(ref.digest)
            found.pins += 1
            self.hits += 1
            return found.slot
        future = self.pending.get(ref.digest)
        if future is None:
            self.misses += 1
            self._drop_abandoned()
            future = self.pending[ref.digest] = self.loader.fetch(ref)
        if not future.done():
            return None
        if error := future.exception():
            del self.pending[ref.digest]
            self.failures += 1
            raise (
                error if isinstance(error, PolypeftError) else StoreError("The adapter could not be loaded.")
            )
        return self._settle(ref, future.result())

    def loading(self, ref: AdapterRef) -> bool:
        future = self.pending.get(ref.digest)
        return future is not None and not future.done()

    def release(self, slot: int) -> None:
        """One row less uses the slot."""
        resident = self.by_slot[slot]
        resident.pins -= 1
        assert resident.pins >= 0, f"slot {slot} was released twice"
        if resident.forgotten and resident.pins == 0:
            self._evict(resident)

    def prefetch(self, ref: AdapterRef) -> None:
        """Start a load into RAM; nobody waits for it here."""
        if ref.digest not in self.by_digest and ref.digest not in self.pending:
            self.loader.fetch(ref)

    def offer(self, ref: AdapterRef, load: "Future[Any]") -> None:
        """A load that was started elsewhere: rows that name it need not start another."""
        if ref.digest not in self.by_digest:
            self.pending[ref.digest] = load

    def forget(self, digest: str) -> None:
        """A deleted version: out of every tier, here as soon as no row uses it."""
        self.loader.forget(digest)
        self.pending.pop(digest, None)
        if resident := self.by_digest.get(digest):
            resident.forgotten = True
            if resident.pins == 0:
                self._evict(resident)

    def _settle(self, ref: AdapterRef, packed: Loaded) -> int | None:
        """Move a loaded adapter into a slot, evicting idle ones as needed; None if pins forbid it."""
        if packed.nbytes > self.budget:
            del self.pending[ref.digest]
            self.failures += 1
            raise StoreError(
                f"The adapter needs {packed.nbytes} bytes on the device; all adapters share {self.budget}."
            )
        idle = [r for r in self.by_digest.values() if r.pins == 0]
        while not self.free or self.nbytes + packed.nbytes > self.budget:
            if not idle:
                return None
            self._evict(idle.pop(0))
            self.evictions += 1
        del self.pending[ref.digest]
        slot = self.free.pop()
        resident = Resident(
            digest=ref.digest,
            method=ref.method,
            slot=slot,
            nbytes=packed.nbytes,
            virtual=packed.virtual,
            given=packed.given,
            summable=packed.summable,
            pins=1,
        )
        self.banks[ref.method].put(resident.slot, packed)
        self.by_digest[ref.digest] = self.by_slot[resident.slot] = resident
        self.nbytes += resident.nbytes
        return resident.slot

    def _drop_abandoned(self) -> None:
        """Loads that ended after all who waited had gone: at most one per slot is held for a return."""
        while len(self.pending) > self.slots:
            done = next((digest for digest, future in self.pending.items() if future.done()), None)
            if done is None:
                return
            del self.pending[done]

    def _evict(self, resident: Resident) -> None:
        self.banks[resident.method].clear(resident.slot)
        del self.by_digest[resident.digest]
        del self.by_slot[resident.slot]
        self.free.append(resident.slot)
        self.nbytes -= resident.nbytes
