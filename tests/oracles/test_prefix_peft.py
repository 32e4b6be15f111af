"""Prefix tuning rows of the engine against PEFT: prefixes shorter and longer than blocks and windows."""

from typing import Any

import pytest

from tests.fixtures.adapters import make_prefix, make_prefix_of
from tests.oracles.bench import LENGTHS, NEW, WORST_REAL, Bench

CASES: dict[str, dict[str, Any]] = {
    "one": {"tokens": 1},
    "five": {"tokens": 5},
    "a block": {"tokens": 16},
    "longer than a window": {"tokens": 21},
    "longer than a step": {"tokens": 40, "scale": 2.0},
    "projection": {"tokens": 7, "projection": True},
}


@pytest.mark.parametrize("case", CASES)
def test_tiny_models(tiny: tuple[str, Bench], case: str) -> None:
    _family, bench = tiny
    adapter = make_prefix(bench.oracle.base, bench.folder / case.replace(" ", "-"), **CASES[case])
    bench.compare(adapter, bench.prompts(LENGTHS), NEW)


@pytest.mark.parametrize("tokens", [3, 20])
def test_smollm2(real: Bench, tokens: int) -> None:
    *_, text = real.texts()
    adapter = make_prefix_of(real.oracle.base, real.folder / str(tokens), text[:tokens], scale=0.1)
    real.compare(adapter, real.texts(), 8, WORST_REAL)
