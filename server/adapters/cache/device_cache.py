"""The device tier: which adapter sits in which slot. No torch, no I/O.

What is evicted, eviction_policy.py says.

    loading --> in RAM --> on its way to a slot --put--> in use (references >= 1)  <-->  idle --evict--> gone

A slot in use is never evicted. Everything happens on the engine's thread: the loader and the copies work
elsewhere and are polled. What goes into use is checked against its seal first; while it is in use it is not.
"""

import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future
from typing import Any

from server.adapters.cache.entries import Fetcher, Loaded, Moving, Pending, Resident, Slots
from server.adapters.cache.eviction_policy import FROM_RAM, FairShares
from server.adapters.cache.load_errors import adapter_errors, load_error
from server.adapters.cache.tier_index import TierIndex
from server.errors import PolypeftError, StoreError
from server.messages import AdapterRef

LEASE_SECONDS = 30.0  # how long a load is kept in RAM for somebody who does not come back for it
MAX_LOADS_PER_TENANT = (
    8  # of one tenant under way or waiting for slots: the next tenant's load is not far back in line
)
MAX_STALE_STEPS = 2  # after which one that nobody asked for makes way for another's


class AdapterCache:
    def __init__(
        self,
        banks: Mapping[str, Slots],
        loader: Fetcher,
        *,
        slots: int,
        budget: int,
        copy: Callable[[Any], Moving],
        shares: FairShares | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.banks = banks
        self.loader = loader
        self.budget = budget
        self.slots = slots
        self.free = list(range(slots, 0, -1))  # slot 0 is "no adapter"
        self.shares = shares or FairShares()
        self.index: TierIndex[Resident] = TierIndex(budget, FROM_RAM, self.shares, slots)
        self.by_digest = self.index.entries
        self.by_slot: dict[int, Resident] = {}
        self.pending: OrderedDict[str, Pending] = OrderedDict()
        self.pinned: dict[str, AdapterRef] = {}  # by their tenants
        self.wanted: list[AdapterRef] = []  # of those, the ones that have not been tried yet
        self.broken: dict[str, PolypeftError] = {}  # what ended loads, for whoever asks for those next
        self.hits = self.misses = self.evictions = self.failures = 0
        self._copy = copy
        self._clock = clock
        self._step = 0

    @property
    def nbytes(self) -> int:
        return self.index.nbytes

    @property
    def busy(self) -> bool:
        """Something is on its way that no row waits for."""
        return bool(self.wanted)

    def acquire(
        self, ref: AdapterRef, *, weight: float = 1.0, mine: Collection[int] = (), again: bool = False
    ) -> int | None:
        """A slot that is the caller's to release; None when the adapter is on its way, or has to wait for
        room (try next step).

        `weight`: the tenant's. `mine`: slots the same row holds already. `again`: the row asked before, and
        counts as asking once. Raises what ended the load; the next request tries it afresh.
        """
        if not again:
            self._count(ref, weight)
        found = self.by_digest.get(ref.digest)
        if found is not None and found.moving is None and self._sound(found):
            found.references += 1
            return found.slot
        if found is not None and found.moving is not None:
            return self._arrive(found, references=1)
        return self._fetch(ref, mine)

    def loading(self, ref: AdapterRef) -> bool:
        """It is on its way: not in RAM yet, or not on the device."""
        if (found := self.by_digest.get(ref.digest)) and found.moving is not None:
            return True
        pending = self.pending.get(ref.digest)
        return pending is None or not pending.future.done()

    def waits_for_itself(self, ref: AdapterRef) -> bool:
        """Its tenant is over its share: room for it comes from that tenant's own rows alone."""
        pending = self.pending.get(ref.digest)
        return pending is not None and pending.own

    def release(self, slot: int) -> None:
        """One row less uses the slot."""
        resident = self.by_slot[slot]
        resident.references -= 1
        assert resident.references >= 0, f"slot {slot} was released twice"
        if resident.forgotten and resident.references == 0:
            self._evict(resident)

    def has(self, ref: AdapterRef) -> bool:
        """It is on the device."""
        return ref.digest in self.by_digest

    def prefetch(self, ref: AdapterRef) -> None:
        """Start a load into RAM for somebody who will come for it; a hint, and dropped when many load."""
        if ref.digest not in self.by_digest and ref.digest not in self.pending:
            self._start(ref)

    def offer(self, ref: AdapterRef, load: "Future[Any]") -> None:
        """A load that was started elsewhere: rows that name it need not start another."""
        if ref.digest not in self.by_digest and ref.digest not in self.pending:
            self.loader.claim(ref.digest)
            self.pending[ref.digest] = Pending(ref, load, self._step, self._clock())

    def pin(self, refs: Collection[AdapterRef]) -> None:
        """What tenants have pinned, all of it: brought onto the device as far as there is room, and kept
        there as far as their shares go (eviction_policy.py).
        """
        self.pinned = {ref.digest: ref for ref in refs}
        self.wanted = [ref for ref in refs if ref.digest not in self.by_digest]
        self.index.set_pinned(self.pinned)

    def forget(self, digest: str) -> None:
        """A deleted version: out of every tier, here as soon as no row uses it."""
        self._let_go(digest)
        self.loader.forget(digest)
        if resident := self.by_digest.get(digest):
            resident.forgotten = True
            if resident.references == 0:
                self._evict(resident)

    def hasten(self, places: int) -> None:
        """Places in the batch stay empty: as many loads that might fill them are worth a core at once."""
        for digest, load in self.pending.items():
            if places > 0 and not load.future.done():
                places -= self.loader.hasten(digest)

    def tend(self) -> None:
        """Once a step: what nobody waits for any more, and pinned adapters on their way."""
        self._step += 1
        for resident in [r for r in self.by_digest.values() if r.moving is not None]:
            try:
                self._arrive(resident, references=0)
            except PolypeftError as error:
                self.broken[resident.digest] = error
        now = self._clock()
        for digest, pending in [*self.pending.items()]:
            if pending.future.done() and now - pending.asked > LEASE_SECONDS:
                self._let_go(digest)
        for ref in self.wanted[:1]:  # one at a time, and each of them once: rows come first
            if ref.digest in self.by_digest or self._bring(ref):
                self.wanted = self.wanted[1:]

    def _bring(self, ref: AdapterRef) -> bool:
        """Whether a pinned adapter has been brought, or cannot be."""
        self.shares.record(ref.tenant, self.shares.weight(ref.tenant) or 1.0)
        try:
            slot = self._fetch(ref, ())
        except PolypeftError:
            return True
        if slot is not None:
            self.release(slot)
        elif self.loading(ref):
            return False
        self._let_go(ref.digest)
        return True

    def _count(self, ref: AdapterRef, weight: float) -> None:
        self.shares.record(ref.tenant, weight)
        self.index.record_request(ref.digest, ref.tenant)
        if ref.digest in self.by_digest:
            self.hits += 1
        else:
            self.misses += 1

    def _sound(self, resident: Resident) -> bool:
        """Whether an idle adapter is still what was loaded; if not it goes, and is loaded again."""
        if resident.references or resident.packed.intact():
            return True
        self._evict(resident)
        self.loader.spoiled(resident.digest, "device")
        return False

    def _start(self, ref: AdapterRef) -> bool:
        """One load more, if not too many wait for their slots already."""
        if self._full(ref.tenant):
            return False
        self.pending[ref.digest] = Pending(ref, self.loader.fetch(ref), self._step, self._clock())
        return True

    def _full(self, tenant: str) -> bool:
        return len(self.pending) >= self.slots or len(self._waiting(tenant)) >= MAX_LOADS_PER_TENANT

    def _waiting(self, tenant: str) -> list[Pending]:
        return [pending for pending in self.pending.values() if pending.ref.tenant == tenant]

    def _drop_stale(self, tenant: str) -> None:
        """When too many wait: the load that nobody has come back for the longest."""
        if self._full(tenant):
            some = self._waiting(tenant) if len(self.pending) < self.slots else self.pending.values()
            done = [pending for pending in some if pending.future.done()]
            oldest = min(done, key=lambda pending: pending.step, default=None)
            if oldest is not None and self._step - oldest.step > MAX_STALE_STEPS:
                self._let_go(oldest.ref.digest)

    def _fetch(self, ref: AdapterRef, mine: Collection[int]) -> int | None:
        if error := self.broken.pop(ref.digest, None):
            raise error
        if ref.digest not in self.pending:
            self._drop_stale(ref.tenant)
            if not self._start(ref):
                return None
        pending = self.pending[ref.digest]
        pending.step, pending.asked = self._step, self._clock()
        if not pending.future.done():
            return None
        if fault := pending.future.exception():
            self._let_go(ref.digest)
            self.failures += 1
            raise load_error(fault)
        packed: Loaded = pending.future.result()
        slot = self._settle(ref, packed, mine)
        if slot is None:
            pending.own = self.index.waits_for_own_rows(ref.tenant, packed.nbytes)
        return slot

    def _settle(self, ref: AdapterRef, packed: Loaded, mine: Collection[int]) -> int | None:
        """Send a loaded adapter to a slot, evicting idle ones as needed; None if there is no room yet."""
        if packed.nbytes > self.budget:
            self._let_go(ref.digest)
            self.failures += 1
            raise StoreError(
                f"The adapter needs {packed.nbytes} bytes on the device; all adapters share {self.budget}."
            )
        own = {self.by_slot[slot].digest for slot in mine}
        gone = self.index.plan_eviction(ref.tenant, packed.nbytes, own)
        if gone is None:
            return None
        self._let_go(ref.digest)
        if not packed.intact():
            self.loader.spoiled(ref.digest, "ram")
            self._start(ref)
            return None
        for resident in gone:
            self._evict(resident)
            self.evictions += 1
        with adapter_errors():
            moving = self._copy(packed)
        resident = Resident(
            ref.digest,
            ref.tenant,
            packed.nbytes,
            references=1,
            pinned=ref.digest in self.pinned,
            method=ref.method,
            slot=self.free.pop(),
            virtual=packed.virtual,
            given=packed.given,
            summable=packed.summable,
            packed=moving.packed,
            moving=moving,
        )
        self.index.add(resident)
        self.by_slot[resident.slot] = resident
        return self._arrive(resident, references=1)

    def _arrive(self, resident: Resident, *, references: int) -> int | None:
        """Into its bank, if the copy has arrived; with so many references from then on."""
        if resident.moving is None or not resident.moving.arrived():
            return None
        resident.moving = None
        with adapter_errors(lambda: self._evict(resident)):
            self.banks[resident.method].put(resident.slot, resident.packed)
        resident.references = references
        if resident.forgotten and not references:
            self._evict(resident)
        return resident.slot

    def _let_go(self, digest: str) -> None:
        """Nobody waits for this load any more."""
        if self.pending.pop(digest, None):
            self.loader.release(digest)

    def _evict(self, resident: Resident) -> None:
        if resident.moving is None:
            self.banks[resident.method].clear(resident.slot)
        self.index.drop(resident.digest)
        del self.by_slot[resident.slot]
        self.free.append(resident.slot)
