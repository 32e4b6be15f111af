"""The device tier: which adapter is in which slot. No torch, no I/O.

    loading --> in RAM --> copying to a slot --put--> in use (references >= 1)  <-->  idle --evict--> gone

A slot in use is never evicted; eviction_policy.py picks the victims. All of this runs on the engine's thread:
the loader and the copies work elsewhere and are polled. An adapter's checksum is verified when it goes into
use, not while it is used.
"""

import time
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future
from typing import Any

from server.adapters.cache.entries import DeviceCopy, Fetcher, Loaded, Resident, Slots
from server.adapters.cache.eviction_policy import FROM_RAM, FairShares
from server.adapters.cache.load_errors import adapter_errors, load_error
from server.adapters.cache.pending_loads import PendingLoads
from server.adapters.cache.tier_index import TierIndex
from server.errors import PolypeftError, StoreError
from server.messages import AdapterRef


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
        self.pending = PendingLoads(loader, slots, clock)
        self.pinned: dict[str, AdapterRef] = {}  # by their tenants
        self.pins_to_load: list[AdapterRef] = []  # pinned adapters whose loads have not been tried yet
        self.copy_errors: dict[str, PolypeftError] = {}  # by digest; raised to the next row that asks
        self.hits = self.misses = self.evictions = self.failures = 0
        self._copy = copy

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
        resident = self.by_digest.get(ref.digest)
        return (resident is not None and resident.copy is not None) or self.pending.is_loading(ref)

    def waits_for_own_rows(self, ref: AdapterRef) -> bool:
        """Whether its tenant is over its share, so that only that tenant's rows can free a slot."""
        pending = self.pending.loads.get(ref.digest)
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
        if ref.digest not in self.by_digest:
            self.pending.start(ref)

    def add_pending(self, ref: AdapterRef, load: "Future[Any]") -> None:
        """Use a load that was started elsewhere for the rows that name this adapter."""
        if ref.digest not in self.by_digest:
            self.pending.adopt(ref, load)

    def pin(self, refs: Collection[AdapterRef]) -> None:
        """Set the pinned adapters of all tenants. They are loaded as far as there is memory for them."""
        self.pinned = {ref.digest: ref for ref in refs}
        self.pins_to_load = [ref for ref in refs if ref.digest not in self.by_digest]
        self.index.set_pinned(self.pinned)

    def forget(self, digest: str) -> None:
        """Remove a deleted version from every tier; from its slot as soon as no row uses it."""
        self.pending.drop(digest)
        self.loader.forget(digest)
        if resident := self.by_digest.get(digest):
            resident.forgotten = True
            if resident.references == 0:
                self._evict(resident)

    def prioritise(self, free_rows: int) -> None:
        """With `free_rows` unused rows in the batch, make up to that many running loads urgent."""
        self.pending.prioritise(free_rows)

    def poll(self) -> None:
        """Once a step: finish copies, drop loads that no row asks for any more, load a pinned adapter."""
        for resident in [r for r in self.by_digest.values() if r.copy is not None]:
            try:
                self._finish_copy(resident, references=0)
            except PolypeftError as error:
                self.copy_errors[resident.digest] = error
        self.pending.poll()
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
        self.pending.drop(ref.digest)
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

    def _fetch(self, ref: AdapterRef, row_slots: Collection[int]) -> int | None:
        """Load the adapter and copy it to a slot, as far as that goes now; the slot once it is there."""
        if error := self.copy_errors.pop(ref.digest, None):
            raise error
        pending = self.pending.request(ref)
        if pending is None or not pending.future.done():
            return None
        if failure := pending.future.exception():
            self.pending.drop(ref.digest)
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
            self.pending.drop(ref.digest)
            self.failures += 1
            raise StoreError(
                f"The adapter needs {packed.nbytes} bytes on the device; all adapters share {self.budget}."
            )
        row_keys = {self.by_slot[slot].key for slot in row_slots}
        victims = self.index.plan_eviction(ref.tenant, packed.nbytes, row_keys)
        if victims is None:
            return None
        self.pending.drop(ref.digest)
        if not packed.intact():
            self.loader.report_corrupt(ref.digest, "ram")
            self.pending.start(ref)
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

    def _evict(self, resident: Resident) -> None:
        if resident.copy is None:
            self.banks[resident.method].clear(resident.slot)
        self.index.drop(resident.digest)
        del self.by_slot[resident.slot]
        self.free.append(resident.slot)
