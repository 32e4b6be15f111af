"""Any traffic at all: budgets hold, what is held stays, whoever may have room gets it."""

from hypothesis import given, settings
from hypothesis import strategies as st

from server.adapters.cache.entries import Entry, TenantUsage
from server.adapters.cache.eviction_policy import ACTIVE_SECONDS, FROM_DISK, FairShares
from server.adapters.cache.tier_index import TierIndex
from tests.fixtures.slots import Clock

asks = st.lists(
    st.tuples(st.integers(0, 30), st.sampled_from("ABC"), st.integers(0, 2), st.booleans()), max_size=120
)
SIZES = (8, 16, 64)


def ask(index: TierIndex[Entry], key: str, tenant: str, nbytes: int, *, hold: bool = False) -> bool:
    """Whether it is here now; what must go for it goes."""
    index.shares.record(tenant)
    index.record_request(key, tenant)
    if key not in index.entries:
        gone = index.plan_eviction(tenant, nbytes)
        if gone is None:
            return False
        for entry in gone:
            assert entry.references == 0
            index.drop(entry.key)
        index.add(Entry(key, tenant, nbytes))
    index.entries[key].references += hold
    return True


def summed(index: TierIndex[Entry]) -> dict[str, TenantUsage]:
    """The books, made anew."""
    uses: dict[str, TenantUsage] = {}
    for entry in index.entries.values():
        uses.setdefault(entry.tenant, TenantUsage()).add(entry)
    return uses


@settings(max_examples=300, deadline=None)
@given(asks=asks, places=st.sampled_from([None, 3, 8]))
def test_no_budget_is_ever_exceeded_and_nothing_held_goes(
    asks: list[tuple[int, str, int, bool]], places: int | None
) -> None:
    index: TierIndex[Entry] = TierIndex(200, FROM_DISK, FairShares(Clock()), places)
    held: list[str] = []
    for number, tenant, size, hold in asks:
        key = str(number)
        known = index.entries.get(key)
        nbytes = known.nbytes if known else SIZES[size]
        if ask(index, key, tenant, nbytes, hold=hold) and hold:
            held.append(key)
        if len(held) > 4:
            index.entries[held.pop(0)].references -= 1
        index.set_pinned(held[1:3])
        assert index.nbytes == sum(entry.nbytes for entry in index.entries.values()) <= 200
        assert places is None or len(index.entries) <= places
        assert set(held) <= index.entries.keys()
        assert index._usage == summed(index)


@settings(max_examples=200, deadline=None)
@given(asks=asks)
def test_with_nothing_held_everybody_gets_room(asks: list[tuple[int, str, int, bool]]) -> None:
    """Whoever waits, waits for something that ends."""
    index: TierIndex[Entry] = TierIndex(64, FROM_DISK, FairShares(Clock()), 3)
    for number, tenant, size, _ in asks:
        assert ask(index, str(number), tenant, SIZES[size])


@settings(max_examples=200, deadline=None)
@given(asks=asks)
def test_what_lies_within_a_share_is_not_anothers_to_take(asks: list[tuple[int, str, int, bool]]) -> None:
    index: TierIndex[Entry] = TierIndex(240, FROM_DISK, FairShares(Clock()), 9)
    for tenant in "ABC":
        index.shares.record(tenant)
    for number, tenant, _, _ in asks:
        before = {t: [e for e in index.entries.values() if e.tenant == t] for t in "ABC"}
        ask(index, f"{tenant}{number}", tenant, 16)
        for other, entries in before.items():
            if other != tenant and len(entries) <= 3:  # a third of the places at least is its own
                assert all(entry.key in index.entries for entry in entries)


def test_a_scan_passes_through_without_taking_what_is_in_demand() -> None:
    index: TierIndex[Entry] = TierIndex(100, FROM_DISK, FairShares(Clock()))
    for _ in range(4):
        for i in range(9):
            ask(index, f"hot{i}", "A", 10)
    for i in range(40):
        ask(index, f"scan{i}", "A", 10)
    assert sum(key.startswith("hot") for key in index.entries) == 9


def test_what_was_in_demand_once_leaves_in_the_end() -> None:
    index: TierIndex[Entry] = TierIndex(100, FROM_DISK, FairShares(Clock()))
    for _ in range(50):
        ask(index, "old", "A", 10)
    for i in range(2000):
        ask(index, f"new{i % 15}", "A", 10)
    assert "old" not in index.entries


def test_of_two_asked_for_alike_the_larger_goes() -> None:
    index: TierIndex[Entry] = TierIndex(100_000_000, FROM_DISK, FairShares(Clock()))
    ask(index, "large", "A", 70_000_000)
    ask(index, "small", "A", 1_000_000)
    gone = index.plan_eviction("A", 50_000_000)
    assert gone is not None
    assert [entry.key for entry in gone] == ["large"]


def test_weights_are_shares() -> None:
    index: TierIndex[Entry] = TierIndex(1000, FROM_DISK, FairShares(Clock()), 12)
    for i in range(300):
        for tenant, weight in (("A", 3.0), ("B", 1.0)):
            index.shares.record(tenant, weight)
            key = f"{tenant}{i % 30}"
            index.record_request(key, tenant)
            if key not in index.entries:
                for entry in index.plan_eviction(tenant, 10) or []:
                    index.drop(entry.key)
                index.add(Entry(key, tenant, 10))
    owners = [entry.tenant for entry in index.entries.values()]
    assert (owners.count("A"), owners.count("B")) == (9, 3)


def test_a_silent_tenant_gives_room_first() -> None:
    clock = Clock()
    index: TierIndex[Entry] = TierIndex(60, FROM_DISK, FairShares(clock), 6)
    for _ in range(5):
        for i in range(3):
            ask(index, f"b{i}", "B", 10)
    clock.now = ACTIVE_SECONDS + 1
    for i in range(6):
        assert ask(index, f"a{i}", "A", 10)
    assert {entry.tenant for entry in index.entries.values()} == {"A"}


def test_a_copy_that_nobody_needs_is_not_worth_what_is_in_demand() -> None:
    index: TierIndex[Entry] = TierIndex(100, FROM_DISK, FairShares(Clock()))
    for _ in range(5):
        for i in range(10):
            ask(index, f"hot{i}", "A", 10)
    index.record_request("once", "A")
    gone = index.plan_eviction("A", 10)
    assert gone
    assert not index.should_admit("once", "A", 10, gone)
    for _ in range(20):
        index.record_request("once", "A")
    assert index.should_admit("once", "A", 10, gone)
    index.shares.record("B")
    assert index.should_admit("another", "B", 10, gone)  # within its share it need not prove anything
