"""The wait for a first token by measured rates, and the refusal of what cannot be met."""

import pytest

from server.engine.scheduling.wait_estimate import MIN_STEPS, WaitEstimate
from server.errors import DeadlineUnreachable
from server.messages import Generate, Priority, Sampling
from tests.server.engine.scheduling.test_scheduler import World


def asked(
    tenant: str = "t", prompt: int = 10, deadline: float = 100.0, priority: Priority = "standard"
) -> Generate:
    return Generate("new", tenant, [1] * prompt, Sampling(max_tokens=8), deadline=deadline, priority=priority)


def measured(rate: float = 100.0, answer: int = 0) -> WaitEstimate:
    """After enough steps of that cost a second."""
    waits = WaitEstimate()
    for step in range(1, MIN_STEPS + 1):
        waits.record_step(step * rate / 10, 0.1)
    for _ in range(1000):
        waits.record_answer(answer)
    return waits


def test_nothing_is_refused_before_anything_is_measured() -> None:
    world, waits = World(), WaitEstimate()
    for _ in range(50):
        world.add(100)
    assert waits.refusal(asked(deadline=0.1), world.scheduler.queues, 0.0) is None


def test_nobody_waits_while_no_row_does() -> None:
    world = World()
    world.add(5)
    world.step()
    assert measured().seconds(asked(), world.scheduler.queues) == 0


def test_a_tenant_waits_for_its_own_rows_and_for_its_share_of_the_rate() -> None:
    world, waits = World(), measured(rate=100, answer=5)
    for _ in range(10):
        world.add(40)  # 40 + 2 * 5, so 500 in all
    queues = world.scheduler.queues
    assert waits.seconds(asked(prompt=100), queues) == pytest.approx(6, rel=0.01)
    assert waits.seconds(asked("other", prompt=100), queues) == pytest.approx(2, rel=0.01)
    assert waits.seconds(asked("other", prompt=900), queues) == pytest.approx(14, rel=0.01)


def test_less_urgent_rows_are_not_waited_for_and_more_urgent_ones_are() -> None:
    world, waits = World(), measured(rate=100)
    for _ in range(10):
        world.add(40)
    queues = world.scheduler.queues
    assert waits.seconds(asked(priority="interactive"), queues) == 0
    assert waits.seconds(asked("other", priority="batch"), queues) == pytest.approx(4.1, rel=0.01)


def test_what_cannot_be_met_is_refused_with_the_wait() -> None:
    world, waits = World(), measured(rate=100)
    for _ in range(10):
        world.add(49)
    queues = world.scheduler.queues
    assert waits.refusal(asked(deadline=1006.0), queues, 1000.0) is None
    error = waits.refusal(asked(deadline=1003.0), queues, 1000.0)
    assert isinstance(error, DeadlineUnreachable)
    assert error.message.startswith("The request would wait about 5.0 s for its first token")
    assert error.wait == pytest.approx(2.0, rel=0.01)


def test_the_time_of_an_answer_counts_too() -> None:
    """Eight tokens at most, a step of 0.1 s each."""
    world, waits = World(), measured(rate=100, answer=20)
    world.add(50)  # 50 + 2 * 20
    queues = world.scheduler.queues
    assert waits.refusal(asked(deadline=1001.7), queues, 1000.0)
    assert waits.refusal(asked(deadline=1001.9), queues, 1000.0) is None


def test_the_rate_follows_what_is_served() -> None:
    waits = measured(rate=100)
    assert waits.rate == pytest.approx(100)
    charged = MIN_STEPS * 10.0
    for _ in range(500):
        charged += 10
        waits.record_step(charged, 1.0)
    assert waits.rate == pytest.approx(10, rel=0.01)
