from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import pytest

from server.adapters.cache import AdapterCache
from server.engine.messages import AdapterRef
from server.errors import InvalidAdapter, StoreError


@dataclass
class Packed:
    nbytes: int = 10
    virtual: int = 0
    given: bool = False
    summable: bool = True


@dataclass
class Slots:
    """A bank that remembers what it holds, and refuses to overwrite."""

    held: dict[int, Any] = field(default_factory=dict)

    def put(self, slot: int, packed: Any) -> None:
        assert slot > 0
        assert slot not in self.held
        self.held[slot] = packed

    def clear(self, slot: int) -> None:
        del self.held[slot]


@dataclass
class Loader:
    """Futures that the test resolves."""

    futures: dict[str, "Future[Any]"] = field(default_factory=dict)
    fetched: list[str] = field(default_factory=list)
    forgotten: list[str] = field(default_factory=list)

    def fetch(self, ref: AdapterRef) -> "Future[Any]":
        self.fetched.append(ref.digest)
        return self.futures.setdefault(ref.digest, Future())

    def forget(self, digest: str) -> None:
        self.forgotten.append(digest)

    def arrive(self, digest: str, nbytes: int = 10, virtual: int = 0, given: bool = False) -> None:
        self.futures.setdefault(digest, Future()).set_result(Packed(nbytes, virtual, given))


def ref(digest: str) -> AdapterRef:
    return AdapterRef("t", f"name-{digest}", 1, digest, "lora", "key")


def build(slots: int = 2, budget: int = 100) -> tuple[AdapterCache, Loader, Slots]:
    loader, bank = Loader(), Slots()
    return AdapterCache({"lora": bank}, loader, slots=slots, budget=budget), loader, bank


def resident(cache: AdapterCache, loader: Loader, digest: str, nbytes: int = 10) -> int:
    loader.futures.pop(digest, None)
    loader.arrive(digest, nbytes)
    slot = cache.acquire(ref(digest))
    assert slot is not None
    return slot


def test_a_load_is_waited_for_and_shared() -> None:
    cache, loader, bank = build()
    assert cache.acquire(ref("a")) is None
    assert cache.acquire(ref("a")) is None
    assert cache.loading(ref("a"))
    assert loader.fetched == ["a"]
    loader.arrive("a")
    first, second = cache.acquire(ref("a")), cache.acquire(ref("a"))
    assert first == second is not None
    assert len(bank.held) == 1
    assert (cache.misses, cache.hits) == (1, 1)


def test_the_least_recently_used_idle_slot_goes() -> None:
    cache, loader, bank = build(slots=2)
    a, b = resident(cache, loader, "a"), resident(cache, loader, "b")
    cache.release(a)
    cache.release(b)
    assert cache.acquire(ref("a")) == a  # a is now the more recent
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
    assert not cache.loading(ref("b"))  # loaded, but there is no room
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


def test_loads_nobody_came_back_for_are_dropped() -> None:
    cache, loader, _ = build(slots=2)
    for i in range(20):
        assert cache.acquire(ref(str(i))) is None
        loader.arrive(str(i))
    assert len(cache.pending) <= 4
