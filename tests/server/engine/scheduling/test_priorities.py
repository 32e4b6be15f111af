"""Priority classes: who makes way for whom, what batch rows get, and that no class starves."""

from typing import Any

import pytest

from server.engine.scheduling.priority_queues import AGEING_SECONDS
from server.engine.scheduling.row import Row
from tests.server.engine.scheduling.test_scheduler import World


def running(world: World, *rows: Row) -> list[bool]:
    return [row.id in world.scheduler.running for row in rows]


def test_batch_rows_fill_what_is_idle_and_make_way_at_once() -> None:
    world = World(max_seqs=4)
    batch = [world.add(tenant="a", priority="batch") for _ in range(6)]
    world.step()
    assert running(world, *batch) == [True] * 4 + [False] * 2
    standard = world.add(tenant="b")
    interactive = [world.add(tenant="a", priority="interactive") for _ in range(2)]
    assert standard in (scheduled := world.step())
    assert set(interactive) <= set(scheduled)
    assert running(world, *batch) == [True] + [False] * 5
    kept = batch[1].output_length
    assert kept == 1
    for row in (standard, *interactive):
        world.scheduler.remove(row)
    world.step()
    assert running(world, *batch) == [True] * 4 + [False] * 2
    assert batch[1].output_length > kept  # it goes on where it was


def test_a_less_urgent_row_takes_nothing() -> None:
    world = World(max_seqs=2)
    interactive = [world.add(tenant="a", priority="interactive") for _ in range(2)]
    world.step()
    waiting = [world.add(tenant=tenant, priority=priority) for tenant, priority in _CLASSES]
    for _ in range(20):
        assert world.step() == interactive
    assert not any(running(world, *waiting))
    assert world.scheduler.preemptions == 0


_CLASSES: list[tuple[str, Any]] = [("b", "standard"), ("c", "batch")]


def test_classes_go_one_after_the_other_within_a_step() -> None:
    world = World(max_seqs=8, tokens=32)
    batch = world.add(20, tenant="a", priority="batch")
    standard = world.add(20, tenant="b")
    interactive = world.add(20, tenant="c", priority="interactive")
    assert [(row.id, row.scheduled) for row in world.scheduler.schedule(0)] == [
        (interactive.id, 20),
        (standard.id, 12),
    ]
    assert not any(running(world, batch))


def test_memory_comes_from_batch_rows_first() -> None:
    world = World(blocks=12, max_seqs=8)
    batch = [world.add(40, tenant="a", priority="batch") for _ in range(2)]
    standard = world.add(40, tenant="b")
    for _ in range(4):
        world.step()
    assert running(world, *batch, standard) == [True] * 3
    interactive = world.add(90, tenant="c", priority="interactive")
    world.step()
    assert running(world, *batch, standard, interactive)[2:] == [True] * 2
    assert not all(running(world, *batch))


def test_slots_come_from_batch_rows_whose_adapters_all_are_in_use() -> None:
    world = World(slots=2, max_seqs=8)
    for name in ("x", "y", "z"):
        world.loader.arrive(name)
    batch = [world.add(tenant="a", adapter=name, priority="batch") for name in ("x", "x", "y")]
    world.step()
    assert running(world, *batch) == [True] * 3
    interactive = world.add(tenant="b", adapter="z", priority="interactive")
    world.step()
    assert running(world, *batch, interactive) == [True, True, False, True]
    assert set(world.cache.by_digest) == {"x", "z"}


@pytest.mark.parametrize(("priority", "classes"), [("standard", 1), ("batch", 2)])
def test_no_class_starves(priority: Any, classes: int) -> None:
    """Under rows of the most urgent class that never end, it waits AGEING_SECONDS for each class above it."""
    world = World(max_seqs=1)
    world.add(tenant="a", priority="interactive")
    row = world.add(tenant="b", priority=priority)
    now = 1.0
    while row.id not in world.scheduler.running:
        world.step(now)
        now += 1
        assert now < 1000
    assert now >= classes * AGEING_SECONDS
    assert now <= classes * (AGEING_SECONDS + 2) + 600  # then its tenant is one of two of that class
    assert row.level == 0


def test_a_class_with_a_row_running_does_not_starve() -> None:
    world = World(max_seqs=2)
    world.add(tenant="a", priority="interactive")
    batch = [world.add(tenant="b", priority="batch") for _ in range(3)]
    for now in range(1, 200):
        world.step(now)
    assert [row.level for row in batch] == [2, 2, 2]
