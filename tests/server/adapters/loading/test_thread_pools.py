"""Loads run on background threads; an urgent one overtakes them, once."""

import os
import threading
from collections.abc import Iterator
from threading import Event

import pytest

from server.adapters.loading.thread_pools import NICENESS, THREADS, LoadPools

LONG = 20  # seconds


@pytest.fixture
def pools() -> Iterator[LoadPools]:
    pools = LoadPools()
    yield pools
    pools.close()


class Task:
    """Records how it was run, and goes on when it is let."""

    def __init__(self) -> None:
        self.urgent: list[bool] = []
        self.niceness: int | None = None
        self.begun, self.may_end = Event(), Event()

    def __call__(self, urgent: bool) -> None:
        self.urgent.append(urgent)
        self.niceness = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
        self.begun.set()
        assert self.may_end.wait(LONG)


@pytest.fixture
def busy(pools: LoadPools) -> Iterator[list[Task]]:
    """The tasks that occupy all background threads."""
    tasks = [Task() for _ in range(THREADS)]
    for i, task in enumerate(tasks):
        pools.submit(f"busy {i}", task)
    assert all(task.begun.wait(LONG) for task in tasks)
    yield tasks
    for task in tasks:
        task.may_end.set()


def test_background_threads_have_low_priority(busy: list[Task]) -> None:
    own = os.getpriority(os.PRIO_PROCESS, 0)
    assert [task.niceness for task in busy] == [max(own, NICENESS)] * THREADS
    assert [task.urgent for task in busy] == [[False]] * THREADS


def test_an_urgent_load_overtakes(pools: LoadPools, busy: list[Task]) -> None:
    first, second = Task(), Task()
    for name, task in (("first", first), ("second", second)):
        task.may_end.set()
        pools.submit(name, task)
    pools.prioritise("second")
    assert second.begun.wait(LONG)
    assert second.niceness == os.getpriority(os.PRIO_PROCESS, 0)
    assert not first.begun.is_set()
    for task in busy:
        task.may_end.set()
    assert first.begun.wait(LONG)
    assert (first.urgent, second.urgent) == ([False], [True]), "each is carried out once"


def test_a_running_or_unknown_load_is_not_made_urgent(pools: LoadPools, busy: list[Task]) -> None:
    assert not pools.prioritise("busy 0")
    assert not pools.prioritise("nobody")
    after = Task()
    pools.submit("after", after)
    assert pools.prioritise("after")
    assert pools.prioritise("after"), "it is under way"
    after.may_end.set()
    assert after.begun.wait(LONG)
    assert busy[0].urgent == [False]


def test_a_postponed_load_waits_for_a_background_thread(pools: LoadPools, busy: list[Task]) -> None:
    late, put_off = Task(), Event()
    late.may_end.set()

    def first(urgent: bool) -> None:
        assert urgent
        pools.postpone("late", late)
        put_off.set()

    pools.submit("late", first)
    assert pools.prioritise("late")
    assert put_off.wait(LONG)
    while pools.prioritise("late"):  # until the thread is done with it
        Event().wait(0.01)
    assert not late.begun.is_set()
    busy[0].may_end.set()
    assert late.begun.wait(LONG)
    assert late.urgent == [False]
