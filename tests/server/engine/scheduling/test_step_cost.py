"""What a guess must be worth follows from what steps take."""

from collections.abc import Callable

import pytest
import torch

from server.engine.scheduling.step_cost import (
    ACCEPTANCE_MARGIN,
    DEFAULT_COSTS,
    MIN_ACCEPTANCE,
    TIMED_TOKENS,
    StepCost,
)
from tests.fixtures.engine import Stand


def test_between_and_beyond_what_is_known_it_goes_straight() -> None:
    costs = StepCost({1: 10.0, 8: 17.0, 64: 73.0})
    assert [costs.seconds(n) for n in (1, 4, 8, 36, 64, 100)] == [10.0, 13.0, 17.0, 45.0, 73.0, 109.0]


@pytest.mark.parametrize(("rows", "expected"), [(1, 1 / 3), (2, 2 / 4), (16, 16 / 18)])
def test_a_guess_is_worth_its_part_of_a_step(rows: int, expected: float) -> None:
    assert StepCost().min_acceptance(rows, 7) == pytest.approx(min(ACCEPTANCE_MARGIN * expected, 1.0))


def test_what_costs_nothing_pays_nearly_always() -> None:
    flat = StepCost({1: 5.0, 16: 5.0, 64: 4.9})
    assert flat.min_acceptance(4, 7) == MIN_ACCEPTANCE
    assert StepCost({1: 1.0, 64: 640.0}).min_acceptance(16, 48) == 1.0
    assert flat.min_acceptance(4, 0) == 1.0


def test_fewer_guesses_than_there_is_room_for_must_pay_too() -> None:
    """Some of the rows find something to guess: where a tile of rows ends, a few cost more than many."""
    stepped = StepCost({1: 10.0, 16: 10.0, 24: 18.0, 64: 22.0})
    assert stepped.min_acceptance(16, 48) == 1.0
    assert stepped.min_acceptance(16, 4) == 1.0
    assert stepped.min_acceptance(8, 8) == MIN_ACCEPTANCE


def test_what_steps_take_beside_is_learnt_from_those_that_run() -> None:
    costs = StepCost({1: 10.0, 64: 73.0})
    before = costs.min_acceptance(16, 16)
    for _ in range(200):
        costs.record(16, costs.seconds(16) + 25.0)
    assert costs.min_acceptance(16, 16) == pytest.approx(before / 2, rel=1e-3)
    for _ in range(200):
        costs.record(16, 0.0)
    assert costs.min_acceptance(16, 16) == pytest.approx(before, rel=1e-3), "never less than nothing"
    usual = StepCost()
    usual.record(16, 1e9)
    assert usual.overhead == 0, "its figures are no seconds"


def test_a_large_model_is_not_kept_waiting() -> None:
    asked: list[int] = []

    def seconds(tokens: int) -> float:
        asked.append(tokens)
        return 1.5

    cost = StepCost()
    cost.measure(seconds)
    assert cost.complete
    assert cost.costs == sorted(DEFAULT_COSTS.items())
    assert asked == [1]


def test_what_is_assumed_holds_until_all_is_measured() -> None:
    cost = StepCost()
    for tokens in TIMED_TOKENS:
        assert cost.costs == sorted(DEFAULT_COSTS.items())
        assert not cost.complete
        cost.measure(lambda n: n / 1000)
        assert cost.complete == (tokens == TIMED_TOKENS[-1])
    assert cost.costs == [(n, n / 1000) for n in TIMED_TOKENS]


def test_timing_leaves_no_trace(stand: Callable[..., Stand]) -> None:
    for family in ("llama", "gpt2"):
        s = stand(family, 0)
        cost, step = s.engine.scheduler.step_cost, s.engine.model.step
        while not cost.complete:
            s.engine.use_idle_time()
        s.engine.use_idle_time()
        assert [n for n, _ in cost.costs] == list(TIMED_TOKENS)
        assert s.engine.blocks.available == s.engine.blocks.count
        assert not any(torch.any(pages != 0) for pages in (*step.pages.keys, *step.pages.values))


def test_timing_takes_no_block_from_a_row_nor_from_the_prefix_cache(stand: Callable[..., Stand]) -> None:
    s = stand("llama", 1)
    rows = [s.generate(9, None), s.generate(4, s.refs[0])]  # of 70 tokens; an adapter acts in the last step
    before = s.alone(rows)
    while not s.engine.scheduler.step_cost.complete:
        s.engine.use_idle_time()
    hits = s.engine.blocks.hits
    assert [done.tokens for done in s.alone(rows)] == [done.tokens for done in before]
    assert s.engine.blocks.hits > hits
