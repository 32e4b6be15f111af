"""One tier's books: what it holds, for whom, and what makes way. No torch, no I/O, no lock: its tier has one.

Whose turn it is to give room, share.py decides; which of its adapters that costs, eviction_policy.py does:

    1. who asks and is over its share with what it asks for gives of its own; if all of that is in use, it
       waits for itself
    2. else those over their share give, the more the further they are over
    3. else, when everything of theirs is in use, whoever has something idle

Held entries (in use, or on their way) never go. Those a tenant has pinned do not go either, as long as its
pins take no more than half of its share: the other half keeps its other adapters going.
"""

from collections.abc import Container
from dataclasses import dataclass
from typing import Generic, TypeVar

from server.adapters.cache.eviction_policy import Asked, Reload
from server.adapters.cache.share import Shares

PINNABLE = 0.5  # of a tenant's share


@dataclass(eq=False)
class Entry:
    """One adapter in a tier. What the books hold of it (all but `pins`) changes through the shelf alone."""

    key: str
    tenant: str  # who asked for it last; its share is charged
    nbytes: int
    pins: int = 0  # > 0: in use, or on its way
    fixed: bool = False  # pinned by its tenant


E = TypeVar("E", bound=Entry)


@dataclass
class Use:
    """What one tenant takes of a tier, and what of that it has pinned."""

    nbytes: int = 0
    count: int = 0
    fixed_bytes: int = 0
    fixed_count: int = 0

    def add(self, entry: Entry, sign: int = 1) -> None:
        self.nbytes += sign * entry.nbytes
        self.count += sign
        if entry.fixed:
            self.fixed_bytes += sign * entry.nbytes
            self.fixed_count += sign


@dataclass
class Books:
    """How things stand while room is being made: what goes is taken off `uses`."""

    uses: dict[str, Use]
    shares: dict[str, float]


class Shelf(Generic[E]):
    """At most `budget` bytes and `places` entries, at every moment."""

    def __init__(self, budget: int, reload: Reload, shares: Shares, places: int | None = None) -> None:
        self.budget = budget
        self.places = places
        self.reload = reload
        self.shares = shares
        self.asked = Asked()
        self.entries: dict[str, E] = {}
        self.nbytes = 0
        self._uses: dict[str, Use] = {}  # of tenants that have entries

    def touch(self, key: str, tenant: str) -> None:
        """`tenant` asks for the adapter, be it here or not."""
        self.asked.touch(key, len(self.entries))
        if (entry := self.entries.get(key)) and entry.tenant != tenant:
            self._enter(entry, -1)
            entry.tenant = tenant
            self._enter(entry)

    def fix(self, keys: Container[str]) -> None:
        """These, of those that are here, are what tenants have pinned."""
        for entry in self.entries.values():
            if entry.fixed != (entry.key in keys):
                self._enter(entry, -1)
                entry.fixed = not entry.fixed
                self._enter(entry)

    def add(self, entry: E) -> None:
        """There must be room."""
        assert entry.key not in self.entries, "one entry a key"
        self.entries[entry.key] = entry
        self.nbytes += entry.nbytes
        self._enter(entry)
        assert self.nbytes <= self.budget, "over budget"

    def drop(self, key: str) -> E | None:
        if entry := self.entries.pop(key, None):
            self.nbytes -= entry.nbytes
            self._enter(entry, -1)
        return entry

    def resize(self, key: str, nbytes: int) -> None:
        """Down to what an entry takes, now that it is known."""
        entry = self.entries[key]
        assert nbytes <= entry.nbytes, "room was made for less"
        self.nbytes += nbytes - entry.nbytes
        self._enter(entry, -1)
        entry.nbytes = nbytes
        self._enter(entry)

    def room(self, tenant: str, nbytes: int, mine: Container[str] = ()) -> list[E] | None:
        """What must go so that `tenant` can put `nbytes` here; None if it has to wait.

        `mine`: entries that the asking row itself holds; to wait for those would be for ever.
        """
        free, places = self.budget - self.nbytes, (self.places or len(self.entries) + 1) - len(self.entries)
        if nbytes <= free and places > 0:
            return []
        books = self._books(tenant, nbytes)
        idle = [entry for entry in self.entries.values() if self._may_go(entry, books)]
        gone: list[E] = []
        while nbytes > free or places <= 0:
            victim = self._victim(tenant, idle, books, mine)
            if victim is None:
                return None
            idle.remove(victim)
            gone.append(victim)
            books.uses[victim.tenant].add(victim, -1)
            free += victim.nbytes
            places += 1
        return gone

    def deserves(self, key: str, tenant: str, nbytes: int, gone: list[E]) -> bool:
        """Whether a newcomer that need not be kept is worth more than all that would go for it.

        A tenant within its share need not prove it: what makes way is above others'.
        """
        if not gone or not self._over(tenant, self._books(tenant, nbytes)):
            return True
        return self.value(key, nbytes) > sum(self.value(entry.key, entry.nbytes) for entry in gone)

    def waits_for_itself(self, tenant: str, nbytes: int) -> bool:
        """Room for so much more of this tenant's comes from its own rows, not from anybody else's."""
        busy = any(entry.pins and entry.tenant == tenant for entry in self.entries.values())
        return busy and self._over(tenant, self._books(tenant, nbytes)) > 0

    def value(self, key: str, nbytes: int) -> float:
        """Seconds of reloading that the adapter spares, by how often it is asked for."""
        return self.asked.frequency(key, len(self.entries)) * self.reload.seconds(nbytes)

    def part(self, nbytes: int, count: int) -> float:
        """How much of the tier this is: of its bytes or of its places, whichever is more."""
        return max(nbytes / self.budget, count / self.places if self.places else 0.0)

    def _victim(self, tenant: str, idle: list[E], books: Books, mine: Container[str]) -> E | None:
        over = {t: excess for t in books.uses if (excess := self._over(t, books))}
        own = [entry for entry in idle if entry.tenant == tenant]
        if tenant in over:
            if own:
                return min(own, key=self._worth)
            own_busy = (e for e in self.entries.values() if e.tenant == tenant and e.pins)
            if any(entry.key not in mine for entry in own_busy):
                return None
        if giving := [entry for entry in idle if entry.tenant in over]:
            return min(giving, key=lambda e: (self._worth(e) / over[e.tenant], self._worth(e)))
        return min(own or idle, key=self._worth, default=None)

    def _worth(self, entry: E) -> float:
        return self.value(entry.key, entry.nbytes) / self.part(entry.nbytes, 1)

    def _may_go(self, entry: E, books: Books) -> bool:
        if entry.pins:
            return False
        if not entry.fixed:
            return True
        use = books.uses[entry.tenant]
        return self.part(use.fixed_bytes, use.fixed_count) > PINNABLE * books.shares[entry.tenant]

    def _over(self, tenant: str, books: Books) -> float:
        """How many times its share the tenant takes; 0 if it is within."""
        use, share = books.uses[tenant], books.shares[tenant]
        part = self.part(use.nbytes, use.count)
        if part <= share * (1 + 1e-9):
            return 0.0
        return part / share if share else float("inf")

    def _books(self, tenant: str, nbytes: int) -> Books:
        """With what `tenant` asks for already in its hands."""
        uses = {
            name: Use(use.nbytes, use.count, use.fixed_bytes, use.fixed_count)
            for name, use in self._uses.items()
        }
        uses.setdefault(tenant, Use()).add(Entry("", tenant, nbytes))
        return Books(uses, self.shares.of(uses))

    def _enter(self, entry: Entry, sign: int = 1) -> None:
        use = self._uses.setdefault(entry.tenant, Use())
        use.add(entry, sign)
        if not use.count:
            del self._uses[entry.tenant]
