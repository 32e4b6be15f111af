"""The device tier: which adapter is in which slot. No torch, no I/O.

    loading --> in RAM --> copying to a slot --put--> in use (references >= 1)  <-->  idle --evict--> gone

A slot in use is never evicted; eviction_policy.py picks the victims. All of this runs on the engine's thread:
the loader and the copies work elsewhere and are polled. An adapter's checksum is verified when it goes into
use, not while it is used.
"""

import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future
from typing import Any

from server.adapters.cache.entries import DeviceCopy, Fetcher, Loaded, Pending, Resident, Slots
from server.adapters.cache.eviction_policy import FROM_RAM, FairShares
from server.adapters.cache.load_errors import adapter_errors, load_error
from server.adapters.cache.tier_index import TierIndex
from server.errors import PolypeftError, StoreError
from server.messages import AdapterRef

LEASE_SECONDS = 30.0  # how long RAM keeps a finished load that no row has asked for again
# Loads of one tenant that run or wait for slots; more would delay the next tenant's load.
MAX_LOADS_PER_TENANT = 8
MAX_STALE_STEPS = 2  # a finished load that no row asked for in so many steps gives up its place to another


class AdapterCache:
    """Adapters in slots 1 to `slots`, at most `budget` bytes; `copy` starts copying one onto the device."""

    def __init__(
        self,
        banks: Mapping[str, Slots],
        loader: Fetcher,
        *,
        slots: int,
        budget: int,
        copy: Callable[[Any], DeviceCopy],
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
        self.pins_to_load: list[AdapterRef] = []  # pinned adapters whose loads have not been tried yet
        self.copy_errors: dict[str, PolypeftError] = {}  # by digest; raised to the next row that asks
        self.hits = self.misses = self.evictions = self.failures = 0
        self._copy = copy
        self._clock = clock
        self._step = 0

    @property
    def nbytes(self) -> int:
        return self.index.nbytes

    @property
    def loading_pins(self) -> bool:
        """Whether pinned adapters are being loaded, which no row waits for."""
        return bool(self.pins_to_load)

    def acquire(
        self, ref: AdapterRef, *, weight: float = 1.0, row_slots: Collection[int] = (), again: bool = False
    ) -> int | None:
        """A slot, which the caller must release; None while the adapter loads or waits for memory.

        `weight`: the tenant's. `row_slots`: slots that the same row holds already. `again`: the row asked
        before; its requests count once. Raises the error that ended the load; the next request loads anew.
        """
        if not again:
            self._count(ref, weight)
        resident = self.by_digest.get(ref.digest)
        if resident is not None and resident.copy is None and self._is_intact(resident):
            resident.references += 1
            return resident.slot
        if resident is not None and resident.copy is not None:
            return self._finish_copy(resident, references=1)
        return self._fetch(ref, row_slots)

    def is_loading(self, ref: AdapterRef) -> bool:
        """Whether it is not in RAM yet, or is being copied to the device."""
        resident, pending = self.by_digest.get(ref.digest), self.pending.get(ref.digest)
        if resident is not None and resident.copy is not None:
            return True
        return pending is None or not pending.future.done()

    def waits_for_own_rows(self, ref: AdapterRef) -> bool:
        """Whether its tenant is over its share, so that only that tenant's rows can free a slot."""
        pending = self.pending.get(ref.digest)
        return pending is not None and pending.waits_for_own_rows

    def release(self, slot: int) -> None:
        """A row stops using the slot."""
        resident = self.by_slot[slot]
        resident.references -= 1
        assert resident.references >= 0, f"slot {slot} was released twice"
        if resident.forgotten and resident.references == 0:
            self._evict(resident)

    def has(self, ref: AdapterRef) -> bool:
        """Whether it is on the device, or being copied there."""
        return ref.digest in self.by_digest

    def prefetch(self, ref: AdapterRef) -> None:
        """Start loading into RAM for a later `acquire`. A hint: ignored while too many loads are pending."""
        if ref.digest not in self.by_digest and ref.digest not in self.pending:
            self._start(ref)

    def add_pending(self, ref: AdapterRef, load: "Future[Any]") -> None:
        """Use a load that was started elsewhere for the rows that name this adapter."""
        if ref.digest not in self.by_digest and ref.digest not in self.pending:
            self.loader.claim(ref.digest)
            self.pending[ref.digest] = Pending(ref, load, self._step, self._clock())

    def pin(self, refs: Collection[AdapterRef]) -> None:
        """Set the pinned adapters of all tenants. They are loaded as far as there is memory for them."""
        self.pinned = {ref.digest: ref for ref in refs}
        self.pins_to_load = [ref for ref in refs if ref.digest not in self.by_digest]
        self.index.set_pinned(self.pinned)

    def forget(self, digest: str) -> None:
        """Remove a deleted version from every tier; from its slot as soon as no row uses it."""
        self._drop_pending(digest)
        self.loader.forget(digest)
        if resident := self.by_digest.get(digest):
            resident.forgotten = True
            if resident.references == 0:
                self._evict(resident)

    def prioritise(self, free_rows: int) -> None:
        """With `free_rows` unused rows in the batch, make up to that many running loads urgent."""
        for digest, load in self.pending.items():
            if free_rows > 0 and not load.future.done():
                free_rows -= self.loader.prioritise(digest)

    def poll(self) -> None:
        """Once a step: finish copies, drop loads that no row asks for any more, load a pinned adapter."""
        self._step += 1
        for resident in [r for r in self.by_digest.values() if r.copy is not None]:
            try:
                self._finish_copy(resident, references=0)
            except PolypeftError as error:
                self.copy_errors[resident.digest] = error
        now = self._clock()
        for digest, pending in [*self.pending.items()]:
            if pending.future.done() and now - pending.requested > LEASE_SECONDS:
                self._drop_pending(digest)
        for ref in self.pins_to_load[:1]:  # one at a time, each tried once: loads of rows come first
            if ref.digest in self.by_digest or self._load_pinned(ref):
                self.pins_to_load = self.pins_to_load[1:]

    def _load_pinned(self, ref: AdapterRef) -> bool:
        """Try to get a pinned adapter into a slot. False while it loads; True once that ended either way."""
        self.shares.record(ref.tenant, self.shares.weight(ref.tenant) or 1.0)
        try:
            slot = self._fetch(ref, ())
        except PolypeftError:
            return True
        if slot is not None:
            self.release(slot)
        elif self.is_loading(ref):
            return False
        self._drop_pending(ref.digest)
        return True

    def _count(self, ref: AdapterRef, weight: float) -> None:
        self.shares.record(ref.tenant, weight)
        self.index.record_request(ref.digest, ref.tenant)
        if ref.digest in self.by_digest:
            self.hits += 1
        else:
            self.misses += 1

    def _is_intact(self, resident: Resident) -> bool:
        """Verify an idle adapter's checksum. A corrupt one is evicted, and loaded again."""
        if resident.references or resident.packed.intact():
            return True
        self._evict(resident)
        self.loader.report_corrupt(resident.digest, "device")
        return False

    def _start(self, ref: AdapterRef) -> bool:
        """Start a load; False if too many are pending."""
        if self._too_many_pending(ref.tenant):
            return False
        self.pending[ref.digest] = Pending(ref, self.loader.fetch(ref), self._step, self._clock())
        return True

    def _too_many_pending(self, tenant: str) -> bool:
        return len(self.pending) >= self.slots or len(self._pending_of(tenant)) >= MAX_LOADS_PER_TENANT

    def _pending_of(self, tenant: str) -> list[Pending]:
        return [pending for pending in self.pending.values() if pending.ref.tenant == tenant]

    def _drop_stale(self, tenant: str) -> None:
        """If too many loads are pending, drop the finished one that no row has asked for the longest."""
        if self._too_many_pending(tenant):
            pending = self.pending.values()
            candidates = self._pending_of(tenant) if len(pending) < self.slots else pending
            done = [load for load in candidates if load.future.done()]
            oldest = min(done, key=lambda load: load.step, default=None)
            if oldest is not None and self._step - oldest.step > MAX_STALE_STEPS:
                self._drop_pending(oldest.ref.digest)

    def _fetch(self, ref: AdapterRef, row_slots: Collection[int]) -> int | None:
        """Load the adapter and copy it to a slot, as far as that goes now; the slot once it is there."""
        if error := self.copy_errors.pop(ref.digest, None):
            raise error
        if ref.digest not in self.pending:
            self._drop_stale(ref.tenant)
            if not self._start(ref):
                return None
        pending = self.pending[ref.digest]
        pending.step, pending.requested = self._step, self._clock()
        if not pending.future.done():
            return None
        if failure := pending.future.exception():
            self._drop_pending(ref.digest)
            self.failures += 1
            raise load_error(failure)
        packed: Loaded = pending.future.result()
        slot = self._start_copy(ref, packed, row_slots)
        if slot is None:
            pending.waits_for_own_rows = self.index.waits_for_own_rows(ref.tenant, packed.nbytes)
        return slot

    def _start_copy(self, ref: AdapterRef, packed: Loaded, row_slots: Collection[int]) -> int | None:
        """Copy a loaded adapter to a slot, evicting idle ones as needed; the slot if the copy took no time.

        Raises StoreError for an adapter over the whole budget.
        """
        if packed.nbytes > self.budget:
            self._drop_pending(ref.digest)
            self.failures += 1
            raise StoreError(
                f"The adapter needs {packed.nbytes} bytes on the device; all adapters share {self.budget}."
            )
        row_keys = {self.by_slot[slot].key for slot in row_slots}
        victims = self.index.plan_eviction(ref.tenant, packed.nbytes, row_keys)
        if victims is None:
            return None
        self._drop_pending(ref.digest)
        if not packed.intact():
            self.loader.report_corrupt(ref.digest, "ram")
            self._start(ref)
            return None
        for victim in victims:
            self._evict(victim)
            self.evictions += 1
        with adapter_errors():
            copy = self._copy(packed)
        resident = Resident(
            ref.digest,
            ref.tenant,
            packed.nbytes,
            references=1,
            pinned=ref.digest in self.pinned,
            method=ref.method,
            slot=self.free.pop(),
            virtual_tokens=packed.virtual_tokens,
            kv_precomputed=packed.kv_precomputed,
            summable=packed.summable,
            packed=copy.packed,
            copy=copy,
        )
        self.index.add(resident)
        self.by_slot[resident.slot] = resident
        return self._finish_copy(resident, references=1)

    def _finish_copy(self, resident: Resident, *, references: int) -> int | None:
        """If its copy has arrived, put it into its bank with this reference count; its slot, else None."""
        if resident.copy is None or not resident.copy.arrived():
            return None
        resident.copy = None
        with adapter_errors(lambda: self._evict(resident)):
            self.banks[resident.method].put(resident.slot, resident.packed)
        resident.references = references
        if resident.forgotten and not references:
            self._evict(resident)
        return resident.slot

    def _drop_pending(self, digest: str) -> None:
        """Stop waiting for a load, and release its claim in RAM."""
        if self.pending.pop(digest, None):
            self.loader.release(digest)

    def _evict(self, resident: Resident) -> None:
        if resident.copy is None:
            self.banks[resident.method].clear(resident.slot)
        self.index.drop(resident.digest)
        del self.by_slot[resident.slot]
        self.free.append(resident.slot)
