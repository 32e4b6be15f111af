"""What a guess must be worth follows from what steps take."""

from collections.abc import Callable

import pytest
import torch

from server.engine.costs import LEAST, MARGIN, USUAL, Costs
from tests.fixtures.engine import Stand


def test_between_and_beyond_what_is_known_it_goes_straight() -> None:
    costs = Costs({1: 10.0, 8: 17.0, 64: 73.0})
    assert [costs.of(n) for n in (1, 4, 8, 36, 64, 100)] == [10.0, 13.0, 17.0, 45.0, 73.0, 109.0]


@pytest.mark.parametrize(("rows", "expected"), [(1, 1 / 3), (2, 2 / 4), (16, 16 / 18)])
def test_a_guess_is_worth_its_part_of_a_step(rows: int, expected: float) -> None:
    assert Costs(USUAL).worth(rows, 7) == pytest.approx(min(MARGIN * expected, 1 - LEAST))


def test_what_costs_nothing_pays_nearly_always() -> None:
    flat = Costs({1: 5.0, 16: 5.0, 64: 4.9})
    assert flat.worth(4, 7) == LEAST
    assert Costs({1: 1.0, 64: 640.0}).worth(16, 48) == 1 - LEAST
    assert flat.worth(4, 0) == 1 - LEAST


def test_a_large_model_is_not_kept_waiting() -> None:
    asked: list[int] = []

    def seconds(tokens: int) -> float:
        asked.append(tokens)
        return 1.5

    assert Costs.timed(seconds).known == sorted(USUAL.items())
    assert asked == [1]


def test_timing_leaves_no_trace(stand: Callable[..., Stand]) -> None:
    for family in ("llama", "gpt2"):
        s = stand(family, 0)
        assert len(s.engine.scheduler.costs.known) > 2
        step = s.engine.model.step
        assert not any(torch.any(pages != 0) for pages in (*step.pages.keys, *step.pages.values))
