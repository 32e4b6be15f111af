"""Any traffic at all: budgets hold, what is held stays, whoever may have room gets it."""

from hypothesis import given, settings
from hypothesis import strategies as st

from server.adapters.cache.eviction_policy import FROM_DISK
from server.adapters.cache.share import IDLE_SECONDS, Shares
from server.adapters.cache.tier_index import Entry, Shelf, Use
from tests.fixtures.slots import Clock

asks = st.lists(
    st.tuples(st.integers(0, 30), st.sampled_from("ABC"), st.integers(0, 2), st.booleans()), max_size=120
)
SIZES = (8, 16, 64)


def ask(shelf: Shelf[Entry], key: str, tenant: str, nbytes: int, *, hold: bool = False) -> bool:
    """Whether it is here now; what must go for it goes."""
    shelf.shares.note(tenant)
    shelf.touch(key, tenant)
    if key not in shelf.entries:
        gone = shelf.room(tenant, nbytes)
        if gone is None:
            return False
        for entry in gone:
            assert entry.pins == 0
            shelf.drop(entry.key)
        shelf.add(Entry(key, tenant, nbytes))
    shelf.entries[key].pins += hold
    return True


def summed(shelf: Shelf[Entry]) -> dict[str, Use]:
    """The books, made anew."""
    uses: dict[str, Use] = {}
    for entry in shelf.entries.values():
        uses.setdefault(entry.tenant, Use()).add(entry)
    return uses


@settings(max_examples=300, deadline=None)
@given(asks=asks, places=st.sampled_from([None, 3, 8]))
def test_no_budget_is_ever_exceeded_and_nothing_held_goes(
    asks: list[tuple[int, str, int, bool]], places: int | None
) -> None:
    shelf: Shelf[Entry] = Shelf(200, FROM_DISK, Shares(Clock()), places)
    held: list[str] = []
    for number, tenant, size, hold in asks:
        key = str(number)
        known = shelf.entries.get(key)
        nbytes = known.nbytes if known else SIZES[size]
        if ask(shelf, key, tenant, nbytes, hold=hold) and hold:
            held.append(key)
        if len(held) > 4:
            shelf.entries[held.pop(0)].pins -= 1
        shelf.fix(held[1:3])
        assert shelf.nbytes == sum(entry.nbytes for entry in shelf.entries.values()) <= 200
        assert places is None or len(shelf.entries) <= places
        assert set(held) <= shelf.entries.keys()
        assert shelf._uses == summed(shelf)


@settings(max_examples=200, deadline=None)
@given(asks=asks)
def test_with_nothing_held_everybody_gets_room(asks: list[tuple[int, str, int, bool]]) -> None:
    """Whoever waits, waits for something that ends."""
    shelf: Shelf[Entry] = Shelf(64, FROM_DISK, Shares(Clock()), 3)
    for number, tenant, size, _ in asks:
        assert ask(shelf, str(number), tenant, SIZES[size])


@settings(max_examples=200, deadline=None)
@given(asks=asks)
def test_what_lies_within_a_share_is_not_anothers_to_take(asks: list[tuple[int, str, int, bool]]) -> None:
    shelf: Shelf[Entry] = Shelf(240, FROM_DISK, Shares(Clock()), 9)
    for tenant in "ABC":
        shelf.shares.note(tenant)
    for number, tenant, _, _ in asks:
        before = {t: [e for e in shelf.entries.values() if e.tenant == t] for t in "ABC"}
        ask(shelf, f"{tenant}{number}", tenant, 16)
        for other, entries in before.items():
            if other != tenant and len(entries) <= 3:  # a third of the places at least is its own
                assert all(entry.key in shelf.entries for entry in entries)


def test_a_scan_passes_through_without_taking_what_is_in_demand() -> None:
    shelf: Shelf[Entry] = Shelf(100, FROM_DISK, Shares(Clock()))
    for _ in range(4):
        for i in range(9):
            ask(shelf, f"hot{i}", "A", 10)
    for i in range(40):
        ask(shelf, f"scan{i}", "A", 10)
    assert sum(key.startswith("hot") for key in shelf.entries) == 9


def test_what_was_in_demand_once_leaves_in_the_end() -> None:
    shelf: Shelf[Entry] = Shelf(100, FROM_DISK, Shares(Clock()))
    for _ in range(50):
        ask(shelf, "old", "A", 10)
    for i in range(2000):
        ask(shelf, f"new{i % 15}", "A", 10)
    assert "old" not in shelf.entries


def test_of_two_asked_for_alike_the_larger_goes() -> None:
    shelf: Shelf[Entry] = Shelf(100_000_000, FROM_DISK, Shares(Clock()))
    ask(shelf, "large", "A", 70_000_000)
    ask(shelf, "small", "A", 1_000_000)
    gone = shelf.room("A", 50_000_000)
    assert gone is not None
    assert [entry.key for entry in gone] == ["large"]


def test_weights_are_shares() -> None:
    shelf: Shelf[Entry] = Shelf(1000, FROM_DISK, Shares(Clock()), 12)
    for i in range(300):
        for tenant, weight in (("A", 3.0), ("B", 1.0)):
            shelf.shares.note(tenant, weight)
            key = f"{tenant}{i % 30}"
            shelf.touch(key, tenant)
            if key not in shelf.entries:
                for entry in shelf.room(tenant, 10) or []:
                    shelf.drop(entry.key)
                shelf.add(Entry(key, tenant, 10))
    owners = [entry.tenant for entry in shelf.entries.values()]
    assert (owners.count("A"), owners.count("B")) == (9, 3)


def test_a_silent_tenant_gives_room_first() -> None:
    clock = Clock()
    shelf: Shelf[Entry] = Shelf(60, FROM_DISK, Shares(clock), 6)
    for _ in range(5):
        for i in range(3):
            ask(shelf, f"b{i}", "B", 10)
    clock.now = IDLE_SECONDS + 1
    for i in range(6):
        assert ask(shelf, f"a{i}", "A", 10)
    assert {entry.tenant for entry in shelf.entries.values()} == {"A"}


def test_a_copy_that_nobody_needs_is_not_worth_what_is_in_demand() -> None:
    shelf: Shelf[Entry] = Shelf(100, FROM_DISK, Shares(Clock()))
    for _ in range(5):
        for i in range(10):
            ask(shelf, f"hot{i}", "A", 10)
    shelf.touch("once", "A")
    gone = shelf.room("A", 10)
    assert gone
    assert not shelf.deserves("once", "A", 10, gone)
    for _ in range(20):
        shelf.touch("once", "A")
    assert shelf.deserves("once", "A", 10, gone)
    shelf.shares.note("B")
    assert shelf.deserves("another", "B", 10, gone)  # within its share it need not prove anything
