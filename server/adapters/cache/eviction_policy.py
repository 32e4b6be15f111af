"""The eviction policy of every tier: which idle adapter is evicted when another one needs its memory.

Each tenant that has asked for adapters lately has a fair share of the tier, by its weight. Victims come from:

    1. the requesting tenant, if it is over its share with the new adapter counted; while all of its adapters
       are in use, it waits for one of them
    2. otherwise tenants over their shares, the one that is furthest over first
    3. otherwise, if all of their adapters are in use, any tenant

Of these the adapter with the lowest score is evicted:

    score = request frequency * seconds to reload / fraction of the tier that the adapter fills

The frequency is a count that halves with every half-life (LRFU, Lee et al. 2001). A half-life is a number of
requests, not of seconds, so an idle night changes nothing. Evicted adapters keep their count, within a bound,
so an adapter that is requested again and again stays, and a scan over many adapters evicts only the last few.
Cost and size enter as in GreedyDual-Size. Referenced entries (in use, or being copied) are never evicted.
Pinned ones are not, while the tenant's pins fill at most half of its share. No torch, no I/O.
`python -m benchmarks.eviction` compares policies by their hits.
"""

import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Container, Iterable
from dataclasses import dataclass
from typing import TypeVar

from server.adapters.cache.entries import Entry, Ledger

HALF_LIFE_REQUESTS_PER_ENTRY = 8
MIN_HALF_LIFE_REQUESTS = 64
MAX_COUNTED_KEYS = 16_384  # about 3 MB
PINNABLE_PART_OF_SHARE = 0.5
ACTIVE_SECONDS = 600.0  # without a request for so long, a tenant has no share
MAX_TENANTS = 10_000  # remembered before the inactive ones are cleared away

E = TypeVar("E", bound=Entry)


@dataclass(frozen=True)
class ReloadCost:
    """What loading an adapter from the tier below takes. An estimate: only ratios matter."""

    latency: float  # seconds, whatever the size
    bandwidth: float  # bytes a second

    def seconds(self, nbytes: int) -> float:
        return self.latency + nbytes / self.bandwidth


FROM_RAM = ReloadCost(0.0005, 10e9)
FROM_DISK = ReloadCost(0.01, 0.5e9)
FROM_STORE = ReloadCost(0.03, 0.2e9)


class DecayedFrequency:
    """How often each key has been requested lately."""

    def __init__(self) -> None:
        self._requests = 0
        self._counts: OrderedDict[str, tuple[float, int]] = OrderedDict()  # key -> (count, at which request)

    def __len__(self) -> int:
        return len(self._counts)

    def record(self, key: str, num_entries: int) -> None:
        """One more request; the tier has `num_entries` now."""
        self._requests += 1
        self._counts[key] = (self.of(key, num_entries) + 1, self._requests)
        self._counts.move_to_end(key)
        if len(self._counts) > MAX_COUNTED_KEYS:
            self._counts.popitem(last=False)

    def of(self, key: str, num_entries: int) -> float:
        """0 for a key that was never requested: an adapter loaded on a hint is evicted before any other."""
        count, then = self._counts.get(key, (0.0, self._requests))
        half_life = max(MIN_HALF_LIFE_REQUESTS, HALF_LIFE_REQUESTS_PER_ENTRY * num_entries)
        return count * float(0.5 ** ((self._requests - then) / half_life))

    def forget(self, key: str) -> None:
        self._counts.pop(key, None)


class FairShares:
    """The weights of active tenants, one object for all tiers. Written by the engine's thread alone."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._tenants: dict[str, tuple[float, float]] = {}  # tenant -> (weight, time of its last request)

    def record(self, tenant: str, weight: float = 1.0) -> None:
        """The tenant requests something now."""
        now = self._clock()
        if len(self._tenants) >= MAX_TENANTS and tenant not in self._tenants:
            active = {t: known for t, known in self._tenants.items() if now - known[1] <= ACTIVE_SECONDS}
            self._tenants = active if len(active) < MAX_TENANTS else {}
        self._tenants[tenant] = (weight, now)

    def weight(self, tenant: str) -> float:
        """0 for an inactive tenant."""
        weight, last = self._tenants.get(tenant, (0.0, 0.0))
        return weight if self._clock() - last <= ACTIVE_SECONDS else 0.0

    def of(self, tenants: Iterable[str]) -> dict[str, float]:
        """The fraction of a tier that each of these tenants is entitled to."""
        weights = {tenant: self.weight(tenant) for tenant in tenants}
        total = sum(weights.values())
        return {tenant: weight / total if total else 0.0 for tenant, weight in weights.items()}


class EvictionPolicy:
    """Scores and victims in a tier of at most `max_bytes` and, if given, `max_entries`."""

    def __init__(self, max_bytes: int, max_entries: int | None, reload: ReloadCost) -> None:
        self.max_bytes = max_bytes
        self.max_entries = max_entries
        self.reload = reload
        self.frequency = DecayedFrequency()

    def seconds_saved(self, key: str, nbytes: int, num_entries: int) -> float:
        """Request frequency * seconds to reload: what keeping the adapter saves."""
        return self.frequency.of(key, num_entries) * self.reload.seconds(nbytes)

    def fraction(self, nbytes: int, count: int) -> float:
        """How much of the tier this is: of its bytes or of its entries, whichever is more."""
        return max(nbytes / self.max_bytes, count / self.max_entries if self.max_entries else 0.0)

    def score(self, entry: Entry, num_entries: int) -> float:
        saved = self.seconds_saved(entry.key, entry.nbytes, num_entries)
        return saved / self.fraction(entry.nbytes, 1)

    def victim(
        self,
        tenant: str,
        idle: Collection[E],
        entries: Collection[E],
        ledger: Ledger,
        row_keys: Container[str],
    ) -> E | None:
        """The entry of `idle` that is evicted for `tenant`; None if the tenant has to wait.

        `row_keys`: keys that the requesting row itself references; it cannot wait for those.
        """
        num_entries = len(entries)
        over = {t: excess for t in ledger.usage if (excess := self.excess(t, ledger))}
        own = [entry for entry in idle if entry.tenant == tenant]
        if tenant in over:
            if own:
                return min(own, key=lambda entry: self.score(entry, num_entries))
            in_use = (entry for entry in entries if entry.tenant == tenant and entry.references)
            if any(entry.key not in row_keys for entry in in_use):
                return None
        scores = {entry.key: self.score(entry, num_entries) for entry in idle}
        if others := [entry for entry in idle if entry.tenant in over]:
            return min(others, key=lambda e: (scores[e.key] / over[e.tenant], scores[e.key]))
        return min(own or idle, key=lambda entry: scores[entry.key], default=None)

    def may_evict(self, entry: Entry, ledger: Ledger) -> bool:
        if entry.references:
            return False
        if not entry.pinned:
            return True
        usage = ledger.usage[entry.tenant]
        pinned = self.fraction(usage.pinned_bytes, usage.pinned_count)
        return pinned > PINNABLE_PART_OF_SHARE * ledger.shares[entry.tenant]

    def excess(self, tenant: str, ledger: Ledger) -> float:
        """How many times its share the tenant takes; 0 if it is within."""
        usage, share = ledger.usage[tenant], ledger.shares[tenant]
        fraction = self.fraction(usage.nbytes, usage.count)
        if fraction <= share * (1 + 1e-9):
            return 0.0
        return fraction / share if share else float("inf")
