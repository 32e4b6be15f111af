"""Loads wait for patient threads; one in a hurry overtakes them, once."""

import os
import threading
from collections.abc import Iterator
from threading import Event

import pytest

from server.adapters.loading.thread_pools import NICENESS, THREADS, LoadPools

LONG = 20  # seconds


@pytest.fixture
def lanes() -> Iterator[LoadPools]:
    lanes = LoadPools()
    yield lanes
    lanes.close()


class Errand:
    """Notes how it was carried out, and goes on when it is let."""

    def __init__(self) -> None:
        self.hastily: list[bool] = []
        self.niceness: int | None = None
        self.begun, self.may_end = Event(), Event()

    def __call__(self, hastily: bool) -> None:
        self.hastily.append(hastily)
        self.niceness = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
        self.begun.set()
        assert self.may_end.wait(LONG)


@pytest.fixture
def busy(lanes: LoadPools) -> Iterator[list[Errand]]:
    """What all patient threads are at."""
    errands = [Errand() for _ in range(THREADS)]
    for i, errand in enumerate(errands):
        lanes.submit(f"busy {i}", errand)
    assert all(errand.begun.wait(LONG) for errand in errands)
    yield errands
    for errand in errands:
        errand.may_end.set()


def test_patient_threads_step_aside(busy: list[Errand]) -> None:
    own = os.getpriority(os.PRIO_PROCESS, 0)
    assert [errand.niceness for errand in busy] == [max(own, NICENESS)] * THREADS
    assert [errand.hastily for errand in busy] == [[False]] * THREADS


def test_a_load_in_a_hurry_overtakes(lanes: LoadPools, busy: list[Errand]) -> None:
    first, second = Errand(), Errand()
    for name, errand in (("first", first), ("second", second)):
        errand.may_end.set()
        lanes.submit(name, errand)
    lanes.hasten("second")
    assert second.begun.wait(LONG)
    assert second.niceness == os.getpriority(os.PRIO_PROCESS, 0)
    assert not first.begun.is_set()
    for errand in busy:
        errand.may_end.set()
    assert first.begun.wait(LONG)
    assert (first.hastily, second.hastily) == ([False], [True]), "each is carried out once"


def test_what_has_begun_or_is_unknown_is_not_hastened(lanes: LoadPools, busy: list[Errand]) -> None:
    assert not lanes.hasten("busy 0")
    assert not lanes.hasten("nobody")
    after = Errand()
    lanes.submit("after", after)
    assert lanes.hasten("after")
    assert lanes.hasten("after"), "it is under way"
    after.may_end.set()
    assert after.begun.wait(LONG)
    assert busy[0].hastily == [False]


def test_what_is_postponed_waits_for_a_patient_thread(lanes: LoadPools, busy: list[Errand]) -> None:
    late, put_off = Errand(), Event()
    late.may_end.set()

    def first(hastily: bool) -> None:
        assert hastily
        lanes.postpone("late", late)
        put_off.set()

    lanes.submit("late", first)
    assert lanes.hasten("late")
    assert put_off.wait(LONG)
    while lanes.hasten("late"):  # until the thread is done with it
        Event().wait(0.01)
    assert not late.begun.is_set()
    busy[0].may_end.set()
    assert late.begun.wait(LONG)
    assert late.hastily == [False]
