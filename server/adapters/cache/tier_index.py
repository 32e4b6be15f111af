"""The index of one tier: its entries, and how much of it each tenant takes. No torch, no I/O, no lock.

Which entries are evicted, eviction_policy.py decides. The tier that owns an index locks around it.
"""

from collections.abc import Container
from typing import Generic, TypeVar

from server.adapters.cache.entries import Entry, Ledger, TenantUsage
from server.adapters.cache.eviction_policy import EvictionPolicy, FairShares, ReloadCost

E = TypeVar("E", bound=Entry)


class TierIndex(Generic[E]):
    """Never holds more than `max_bytes`, nor than `max_entries` if given. `reload`: from the tier below."""

    def __init__(
        self, max_bytes: int, reload: ReloadCost, shares: FairShares, max_entries: int | None = None
    ) -> None:
        self.shares = shares
        self.policy = EvictionPolicy(max_bytes, max_entries, reload)
        self.entries: dict[str, E] = {}
        self.nbytes = 0
        self._usage: dict[str, TenantUsage] = {}  # of tenants that have entries

    @property
    def max_bytes(self) -> int:
        return self.policy.max_bytes

    def record_request(self, key: str, tenant: str) -> None:
        """Count a request by `tenant`, whether the adapter is in this tier or not."""
        self.policy.frequency.record(key, len(self.entries))
        if (entry := self.entries.get(key)) and entry.tenant != tenant:
            self._count(entry, -1)
            entry.tenant = tenant
            self._count(entry)

    def set_pinned(self, keys: Container[str]) -> None:
        """Set which entries are pinned: `keys` are all that tenants have pinned."""
        for entry in self.entries.values():
            if entry.pinned != (entry.key in keys):
                self._count(entry, -1)
                entry.pinned = not entry.pinned
                self._count(entry)

    def add(self, entry: E) -> None:
        """Add an entry for which there is free memory (`plan_eviction`)."""
        assert entry.key not in self.entries, "one entry a key"
        self.entries[entry.key] = entry
        self.nbytes += entry.nbytes
        self._count(entry)
        assert self.nbytes <= self.max_bytes, "over budget"

    def drop(self, key: str) -> E | None:
        if entry := self.entries.pop(key, None):
            self.nbytes -= entry.nbytes
            self._count(entry, -1)
        return entry

    def shrink(self, key: str, nbytes: int) -> None:
        """Reduce a reservation to the bytes that the entry takes, at most those reserved."""
        entry = self.entries[key]
        assert nbytes <= entry.nbytes, "less was reserved"
        self.nbytes += nbytes - entry.nbytes
        self._count(entry, -1)
        entry.nbytes = nbytes
        self._count(entry)

    def plan_eviction(self, tenant: str, nbytes: int, row_keys: Container[str] = ()) -> list[E] | None:
        """What must be evicted so that `tenant` can put `nbytes` here; None if it has to wait.

        `row_keys`: keys that the requesting row itself references; it cannot wait for those.
        """
        free_bytes = self.max_bytes - self.nbytes
        free_entries = (self.policy.max_entries or len(self.entries) + 1) - len(self.entries)
        if nbytes <= free_bytes and free_entries > 0:
            return []
        ledger = self._ledger(tenant, nbytes)
        idle = [entry for entry in self.entries.values() if self.policy.may_evict(entry, ledger)]
        evicted: list[E] = []
        while nbytes > free_bytes or free_entries <= 0:
            victim = self.policy.victim(tenant, idle, self.entries.values(), ledger, row_keys)
            if victim is None:
                return None
            idle.remove(victim)
            evicted.append(victim)
            ledger.usage[victim.tenant].add(victim, -1)
            free_bytes += victim.nbytes
            free_entries += 1
        return evicted

    def should_admit(self, key: str, tenant: str, nbytes: int, evicted: list[E]) -> bool:
        """Whether keeping an optional new entry saves more seconds than the entries `evicted` for it.

        Always for a tenant within its share: the victims then exceed the shares of others.
        """
        if not evicted or not self.policy.excess(tenant, self._ledger(tenant, nbytes)):
            return True
        saved = [self.policy.seconds_saved(e.key, e.nbytes, len(self.entries)) for e in evicted]
        return self.policy.seconds_saved(key, nbytes, len(self.entries)) > sum(saved)

    def waits_for_own_rows(self, tenant: str, nbytes: int) -> bool:
        """Whether only the tenant's own adapters, some of them in use, can be evicted for `nbytes` more."""
        busy = any(entry.references and entry.tenant == tenant for entry in self.entries.values())
        return busy and self.policy.excess(tenant, self._ledger(tenant, nbytes)) > 0

    def _ledger(self, tenant: str, nbytes: int) -> Ledger:
        """Usage and shares, with `nbytes` that `tenant` requests counted as its own."""
        usage = {name: usage.copy() for name, usage in self._usage.items()}
        usage.setdefault(tenant, TenantUsage()).add(Entry("", tenant, nbytes))
        return Ledger(usage, self.shares.of(usage))

    def _count(self, entry: Entry, sign: int = 1) -> None:
        usage = self._usage.setdefault(entry.tenant, TenantUsage())
        usage.add(entry, sign)
        if not usage.count:
            del self._usage[entry.tenant]
