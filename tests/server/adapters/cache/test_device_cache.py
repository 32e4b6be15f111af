from typing import Any

import pytest

from server.adapters.cache.device_cache import AdapterCache
from server.adapters.cache.pending_loads import KEEP_SECONDS, MAX_LOADS_PER_TENANT
from server.adapters.loading.device_copy import Copy
from server.errors import InvalidAdapter, StoreError
from server.messages import AdapterRef
from tests.fixtures.slots import Clock, Loader, Slots, make_cache


def ref(digest: str, tenant: str = "t") -> AdapterRef:
    return AdapterRef(tenant, f"name-{digest}", 1, digest, "lora", "key")


def build(slots: int = 2, budget: int = 100, **more: Any) -> tuple[AdapterCache, Loader, Slots]:
    loader, bank = Loader(), Slots()
    return make_cache(loader, bank, slots=slots, budget=budget, **more), loader, bank


def resident(cache: AdapterCache, loader: Loader, digest: str, nbytes: int = 10, tenant: str = "t") -> int:
    """Its slot, which the caller has to release."""
    if digest not in cache.by_digest:
        loader.futures.pop(digest, None)
        loader.arrive(digest, nbytes)
    slot = cache.acquire(ref(digest, tenant))
    assert slot is not None
    return slot


def test_a_load_is_waited_for_and_shared() -> None:
    cache, loader, bank = build()
    assert cache.acquire(ref("a")) is None
    assert cache.acquire(ref("a"), again=True) is None
    assert cache.is_loading(ref("a"))
    assert loader.fetched == ["a"]
    loader.arrive("a")
    first, second = cache.acquire(ref("a"), again=True), cache.acquire(ref("a"))
    assert first == second is not None
    assert len(bank.held) == 1
    assert (cache.misses, cache.hits) == (1, 1)
    assert loader.claims["a"] == 0


def test_of_equals_the_least_recently_asked_for_goes() -> None:
    cache, loader, bank = build(slots=2)
    a, b = resident(cache, loader, "a"), resident(cache, loader, "b")
    cache.release(a)
    cache.release(b)
    assert cache.acquire(ref("a")) == a  # more often and more recently asked for than b
    cache.release(a)
    assert resident(cache, loader, "c") == b
    assert set(cache.by_digest) == {"a", "c"}
    assert cache.evictions == 1
    assert len(bank.held) == 2


def test_a_slot_in_use_is_never_evicted() -> None:
    cache, loader, _ = build(slots=1)
    a = resident(cache, loader, "a")
    loader.arrive("b")
    assert cache.acquire(ref("b")) is None
    assert not cache.is_loading(ref("b"))  # loaded, but there is no room
    cache.release(a)
    assert cache.acquire(ref("b")) == a


def test_bytes_are_budgeted_exactly() -> None:
    cache, loader, _ = build(slots=8, budget=100)
    for digest in "abc":
        cache.release(resident(cache, loader, digest, 30))
    assert cache.nbytes == 90
    cache.release(resident(cache, loader, "d", 65))
    assert cache.nbytes == 95
    assert set(cache.by_digest) == {"c", "d"}


def test_an_adapter_over_the_whole_budget_is_refused() -> None:
    cache, loader, _ = build(budget=100)
    loader.arrive("a", 101)
    with pytest.raises(StoreError, match="101 bytes"):
        cache.acquire(ref("a"))


def test_a_failed_load_is_told_once_and_tried_afresh() -> None:
    cache, loader, _ = build()
    assert cache.acquire(ref("a")) is None
    loader.futures.pop("a").set_exception(InvalidAdapter("bad"))
    with pytest.raises(InvalidAdapter):
        cache.acquire(ref("a"))
    assert cache.acquire(ref("a")) is None
    assert loader.fetched == ["a", "a"]


def test_a_forgotten_adapter_leaves_with_its_last_row() -> None:
    cache, loader, bank = build()
    slot = resident(cache, loader, "a")
    cache.forget("a")
    assert loader.forgotten == ["a"]
    assert slot in bank.held
    cache.release(slot)
    assert bank.held == {}
    assert cache.nbytes == 0


def test_loads_nobody_comes_back_for_make_way() -> None:
    """And no more are under way, or wait in RAM for a slot, than there are slots."""
    cache, loader, _ = build(slots=2)
    for i in range(20):
        cache.acquire(ref(str(i)))
        assert len(cache.pending.loads) <= 2
        for digest in [d for d, pending in cache.pending.loads.items() if not pending.future.done()]:
            loader.arrive(digest)
        for _step in range(4):
            cache.poll()
    assert len(loader.fetched) == 20
    assert sum(loader.claims.values()) == len(cache.pending.loads) <= 2


def test_as_many_loads_are_prioritised_as_places_are_empty() -> None:
    cache, loader, _ = build(slots=4)
    for name in "abc":
        assert cache.acquire(ref(name)) is None
    loader.arrive("a")
    cache.prioritise(0)
    assert loader.prioritised == []
    cache.prioritise(1)
    assert loader.prioritised == ["b"]
    loader.large.add("b")
    cache.prioritise(1)
    assert loader.prioritised == ["b", "b", "c"], "one that is not leaves its place to the next"


def test_a_load_that_is_waited_for_keeps_its_place() -> None:
    cache, loader, _ = build(slots=1)
    held = resident(cache, loader, "a")
    assert cache.acquire(ref("b")) is None
    loader.arrive("b")
    for _step in range(10):  # b's row asks each step, and so does c's
        cache.poll()
        assert cache.acquire(ref("b"), again=True) is None
        assert cache.acquire(ref("c")) is None
        assert cache.is_loading(ref("c"))
    assert "c" not in loader.fetched
    cache.release(held)
    assert cache.acquire(ref("b"), again=True) is not None
    assert cache.acquire(ref("c"), again=True) is None
    assert loader.fetched[-1] == "c"


def test_a_load_that_nobody_comes_back_for_is_dropped() -> None:
    clock = Clock()
    cache, loader, _ = build(slots=2, clock=clock)
    cache.prefetch(ref("a"))
    loader.arrive("a")
    cache.poll()
    assert loader.claims["a"] == 1
    clock.now = KEEP_SECONDS + 1
    cache.poll()
    assert (loader.claims["a"], len(cache.pending.loads)) == (0, 0)


def test_a_prefetch_is_found_by_the_row_it_was_for() -> None:
    cache, loader, _ = build()
    cache.prefetch(ref("a"))
    cache.prefetch(ref("a"))
    loader.arrive("a")
    assert cache.acquire(ref("a")) is not None
    assert loader.fetched == ["a"]


def test_a_spoiled_resident_is_counted_and_loaded_again() -> None:
    cache, loader, bank = build()
    slot = resident(cache, loader, "a")
    bank.held[slot].sound = False
    assert cache.acquire(ref("a")) == slot  # in use: nothing can be done for the rows that run
    cache.release(slot)
    cache.release(slot)
    assert cache.acquire(ref("a")) is None
    assert loader.corrupt == [("a", "device")]
    assert bank.held == {}
    loader.arrive("a")
    assert cache.acquire(ref("a")) is not None


def test_a_spoiled_copy_in_ram_never_reaches_a_slot() -> None:
    cache, loader, bank = build()
    cache.acquire(ref("a"))
    loader.arrive("a")
    loader.futures["a"].result().sound = False
    assert cache.acquire(ref("a"), again=True) is None
    assert (loader.corrupt, bank.held) == ([("a", "ram")], {})
    assert cache.is_loading(ref("a"))
    loader.arrive("a")
    assert cache.acquire(ref("a"), again=True) is not None


def test_a_copy_on_its_way_is_nobodys_to_use_or_evict() -> None:
    """The twin of CUDA's: copies that take their time."""
    here: set[int] = set()
    cache, loader, bank = build(slots=1, copy=lambda packed: Copy(packed, lambda: id(packed) in here))
    cache.acquire(ref("a"))
    loader.arrive("a")
    assert cache.acquire(ref("a"), again=True) is None
    assert cache.is_loading(ref("a"))
    assert (bank.held, cache.nbytes) == ({}, 10)  # not there, but its room is taken
    loader.arrive("b")
    assert cache.acquire(ref("b")) is None
    cache.poll()
    assert bank.held == {}
    here.add(id(loader.futures["a"].result()))
    slot = cache.acquire(ref("a"), again=True)
    assert slot is not None
    assert list(bank.held) == [slot]
    cache.release(slot)
    here.add(id(loader.futures["b"].result()))
    assert cache.acquire(ref("b"), again=True) == slot


def test_a_row_that_left_leaves_its_copy_idle() -> None:
    here: list[bool] = []
    cache, loader, bank = build(slots=1, copy=lambda packed: Copy(packed, lambda: bool(here)))
    cache.acquire(ref("a"))
    loader.arrive("a")
    assert cache.acquire(ref("a"), again=True) is None
    here.append(True)
    cache.poll()
    assert len(bank.held) == 1
    assert cache.by_digest["a"].references == 0


def test_pinned_adapters_come_by_themselves_and_stay() -> None:
    cache, loader, _ = build(slots=4)
    cache.pin([ref("a"), ref("b")])
    assert cache.loading_pins
    for digest in "ab":
        cache.poll()
        loader.arrive(digest)
        cache.poll()
    assert cache.pins_to_load == []
    assert set(cache.by_digest) == {"a", "b"}
    for i in range(20):
        cache.release(resident(cache, loader, str(i)))
        assert {"a", "b"} <= set(cache.by_digest)
    cache.pin([ref("b")])
    for i in range(20, 25):
        cache.release(resident(cache, loader, str(i)))
    assert "a" not in cache.by_digest
    assert "b" in cache.by_digest


def test_pins_past_half_a_share_protect_nothing() -> None:
    """Else a tenant's other adapters would find no slot."""
    cache, loader, _ = build(slots=4)
    cache.pin([ref(digest) for digest in "abcd"])
    for digest in "abcd":
        cache.poll()
        loader.arrive(digest)
        cache.poll()
    assert set(cache.by_digest) == set("abcd")
    cache.release(resident(cache, loader, "e"))
    assert "e" in cache.by_digest


def test_a_pinned_adapter_that_cannot_be_loaded_is_left() -> None:
    cache, loader, _ = build()
    cache.pin([ref("a")])
    cache.poll()
    loader.futures["a"].set_exception(InvalidAdapter("bad"))
    cache.poll()
    assert not cache.loading_pins
    assert cache.failures == 1


def test_a_flood_does_not_touch_what_another_tenant_uses() -> None:
    """A floods 200 adapters; B asks for its four now and then, and finds them."""
    cache, loader, _ = build(slots=8, budget=1000)
    for digest in "wxyz":
        cache.release(resident(cache, loader, digest, tenant="B"))
    hits = 0
    for i in range(2000):
        cache.release(resident(cache, loader, f"a{i % 200}", tenant="A"))
        if i % 50 == 0:
            wanted = "wxyz"[i // 50 % 4]
            hits += wanted in cache.by_digest
            cache.release(resident(cache, loader, wanted, tenant="B"))
    assert hits == 40
    assert sum(r.tenant == "A" for r in cache.by_digest.values()) == 4


def test_a_flood_of_used_slots_waits_for_itself() -> None:
    """A's rows hold all it may have: it waits for them, B's idle adapters stay, and B goes on."""
    cache, loader, _ = build(slots=4)
    for digest in "xy":
        cache.release(resident(cache, loader, digest, tenant="B"))
    used = [resident(cache, loader, digest, tenant="A") for digest in "ab"]
    loader.arrive("c")
    assert cache.acquire(ref("c", "A")) is None
    assert cache.waits_for_own_rows(ref("c", "A"))
    loader.arrive("z")
    assert cache.acquire(ref("z", "B")) is not None  # of its own
    assert "c" not in cache.by_digest
    cache.release(used[0])
    assert cache.acquire(ref("c", "A"), again=True) is not None


def test_alone_a_tenant_may_have_all() -> None:
    cache, loader, _ = build(slots=4)
    for digest in "abcd":
        cache.release(resident(cache, loader, digest))
    assert len(cache.by_digest) == 4
    assert cache.evictions == 0


def test_a_row_with_two_adapters_does_not_wait_for_itself_for_ever() -> None:
    """Each tenant's share is one slot, and A's row needs two."""
    cache, loader, _ = build(slots=2)
    cache.release(resident(cache, loader, "x", tenant="B"))
    first = resident(cache, loader, "a", tenant="A")
    loader.arrive("b")
    assert cache.acquire(ref("b", "A"), row_slots=(first,)) is not None


def test_a_flood_of_loads_does_not_stand_in_line_before_anothers() -> None:
    cache, loader, _ = build(slots=64, budget=1000)
    for i in range(40):
        cache.acquire(ref(f"a{i}", "A"))
        cache.prefetch(ref(f"p{i}", "A"))
    assert len(loader.fetched) == MAX_LOADS_PER_TENANT
    cache.acquire(ref("b", "B"))
    assert loader.fetched[-1] == "b"
    for digest in loader.fetched[:MAX_LOADS_PER_TENANT]:
        loader.arrive(digest)
    slots = [cache.acquire(ref(f"a{i}", "A"), again=True) for i in range(40)]
    assert None not in slots[: MAX_LOADS_PER_TENANT // 2]
    assert len(loader.fetched) > MAX_LOADS_PER_TENANT + 1
