from dataclasses import dataclass

import pytest

from adapters_store.object_store.circuit_breaker import (
    FIRST_OPEN_SECONDS,
    MAX_FAILURES,
    MAX_OPEN_SECONDS,
    CircuitBreaker,
)
from server.errors import StoreError


@dataclass
class Clock:
    now: float = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def state(breaker: CircuitBreaker) -> str:
    return breaker.state


def call(breaker: CircuitBreaker, succeeded: bool) -> bool:
    return breaker.leave(breaker.enter(), succeeded)


def opened(clock: Clock) -> CircuitBreaker:
    breaker = CircuitBreaker(clock=clock)
    assert [call(breaker, succeeded=False) for _ in range(MAX_FAILURES)] == [False] * (MAX_FAILURES - 1) + [
        True
    ]
    return breaker


def test_it_opens_at_failures_in_a_row_only(clock: Clock) -> None:
    breaker = CircuitBreaker(clock=clock)
    for _ in range(3):
        for _ in range(MAX_FAILURES - 1):
            call(breaker, succeeded=False)
        call(breaker, succeeded=True)
    assert (state(breaker), breaker.times_opened) == ("closed", 0)


def test_open_it_lets_nobody_in_until_one_may_try(clock: Clock) -> None:
    breaker = opened(clock)
    assert (state(breaker), breaker.times_opened) == ("open", 1)
    with pytest.raises(StoreError, match="at present"):
        breaker.enter()
    clock.now += FIRST_OPEN_SECONDS
    assert state(breaker) == "half-open"
    assert breaker.enter()
    for _ in range(3):
        with pytest.raises(StoreError):  # beside the probe
            breaker.enter()
    breaker.leave(probe=True, succeeded=True)
    assert state(breaker) == "closed"
    assert not breaker.enter()


def test_a_probe_that_fails_makes_the_wait_longer_up_to_a_limit(clock: Clock) -> None:
    breaker, wait = opened(clock), FIRST_OPEN_SECONDS
    for _ in range(8):
        clock.now += wait
        assert call(breaker, succeeded=False)
        wait = min(2 * wait, MAX_OPEN_SECONDS)
        clock.now += wait - 0.01
        with pytest.raises(StoreError):
            breaker.enter()
        clock.now += 0.01
        assert state(breaker) == "half-open"
        clock.now -= wait
    clock.now += MAX_OPEN_SECONDS
    call(breaker, succeeded=True)
    for _ in range(MAX_FAILURES):
        call(breaker, succeeded=False)
    clock.now += FIRST_OPEN_SECONDS  # the first wait again
    assert state(breaker) == "half-open"


def test_calls_from_before_it_opened_neither_open_it_again_nor_stand_in_the_probes_way(clock: Clock) -> None:
    breaker = CircuitBreaker(clock=clock)
    late = [breaker.enter() for _ in range(2)]
    for _ in range(MAX_FAILURES):
        call(breaker, succeeded=False)
    breaker.leave(late[0], succeeded=False)
    assert breaker.times_opened == 1
    clock.now += FIRST_OPEN_SECONDS
    assert breaker.enter()
    breaker.leave(late[1], succeeded=True)  # the store answers
    assert state(breaker) == "closed"
    breaker.leave(probe=True, succeeded=False)
    assert state(breaker) == "closed"


def test_one_that_never_opens(clock: Clock) -> None:
    breaker = CircuitBreaker(failures=None, clock=clock)
    assert not any(call(breaker, succeeded=False) for _ in range(100))
    assert state(breaker) == "closed"
