"""The policy against LRU and against what nobody can do better than, on traces small enough for every run."""

import pytest

from benchmarks.eviction import Trace, belady, bound, disk, limits, lru, make_traces, ours, outcome

TRACES = {trace.name: trace for trace in make_traces(300, 4000, seed=3)}
SKEWED = [name for name in TRACES if "alpha 1" not in name]


@pytest.mark.parametrize("name", SKEWED)
def test_on_skewed_traffic_it_beats_lru_in_hits_and_in_cost(name: str) -> None:
    trace = TRACES[name]
    own, theirs = outcome(trace, ours(trace)), outcome(trace, lru(trace))
    assert own.hits > theirs.hits
    assert own.cost_misses < theirs.cost_misses


@pytest.mark.parametrize("name", TRACES)
def test_no_policy_passes_the_bound(name: str) -> None:
    trace = TRACES[name]
    best = limits(trace)
    for policy in (lru, ours, disk, belady):
        found = outcome(trace, policy(trace))
        assert found.hits <= best.hits + 1e-9
        assert found.byte_misses >= best.byte_misses - 1e-9
        assert found.cost_misses >= best.cost_misses - 1e-9


def test_the_bound_of_a_trace_done_by_hand() -> None:
    """Room for one: a a b a."""
    trace = Trace("by hand", [0, 0, 1, 0], [10, 10], 10)
    assert belady(trace) == [False, True, False, True]  # b is not kept at all
    assert bound(trace, lambda _size: 1.0) == pytest.approx(0.5)  # a stays all four asks, b needs no room
    assert lru(trace) == [False, True, False, False]
