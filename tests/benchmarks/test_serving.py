"""benchmarks/serving.py: its traffic is what it says, and its figures are the requests'."""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from benchmarks.serving import Objective, Served, figures_of
from benchmarks.support.traffic import Arrivals, Ask, Text, traffic

TEXTS = [Text("a", 2), Text("b", 40)]


def asked(kind: Arrivals, seed: int = 0) -> list[Ask]:
    return traffic(kind, 5.0, 400.0, TEXTS, adapters=20, alpha=0.3, seed=seed)


@pytest.mark.parametrize("kind", ["poisson", "gamma"])
def test_as_many_come_as_were_ordered_and_the_same_again(kind: Arrivals) -> None:
    found = asked(kind)
    assert len(found) == 2000
    assert found == asked(kind) != asked(kind, seed=1)
    assert [ask.at for ask in found] == sorted(ask.at for ask in found)
    assert found[-1].at == pytest.approx(400.0)
    assert {ask.text for ask in found} == set(TEXTS)


def test_gamma_comes_in_bursts_where_poisson_does_not() -> None:
    def variation(kind: Arrivals) -> float:
        gaps = [after.at - before.at for before, after in pairwise(asked(kind))]
        return float(np.std(gaps) / np.mean(gaps))

    assert variation("poisson") == pytest.approx(1.0, abs=0.1)
    assert variation("gamma") == pytest.approx(2.0, abs=0.3)


def test_a_few_adapters_are_asked_for_most_and_none_is_out_of_range() -> None:
    counts = Counter(ask.adapter for ask in asked("poisson"))
    assert counts.keys() <= set(range(20))
    assert counts.most_common(1)[0][0] == 0
    # of 20, the first has the part of a power law's mass below 1/20
    assert counts[0] / 2000 == pytest.approx(20**-0.3, abs=0.05)


def test_the_objective_is_missed_by_what_is_late_slow_or_refused() -> None:
    served = [
        Served(11, first=0.1, last=0.6),  # 50 ms a token
        Served(11, first=2.0, last=2.5),  # late
        Served(11, first=0.1, last=2.1),  # 200 ms a token
        Served(11, error="queue_full"),
    ]
    figures = figures_of(served, 10.0, Objective(first_ms=1000, token_ms=100))
    assert figures["objective_kept"] == 0.25
    assert figures["failed"] == {"queue_full": 1}
    assert figures["tokens_per_s"] == 3.3
    assert figures["ttft_p50_ms"] == pytest.approx(100)
    assert figures["tpot_p50_ms"] == pytest.approx(50)
    assert figures["tpot_p99_ms"] == pytest.approx(200, abs=5)
