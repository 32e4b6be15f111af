"""Prompt tuning and P-tuning rows of the engine against PEFT; Gemma scales its own embeddings, not these."""

from typing import Any

import pytest

from tests.fixtures.adapters import make_prompt
from tests.oracles.bench import LENGTHS, NEW, WORST_REAL, Bench

CASES: dict[str, dict[str, Any]] = {
    "one": {"tokens": 1},
    "five": {"tokens": 5},
    "a block": {"tokens": 16},
    "longer than a window": {"tokens": 21},
    "longer than a step": {"tokens": 40},
    "MLP": {"tokens": 7, "encoder": "MLP"},
    "LSTM": {"tokens": 7, "encoder": "LSTM"},
}


@pytest.mark.parametrize("case", CASES)
def test_tiny_models(tiny: tuple[str, Bench], case: str) -> None:
    _family, bench = tiny
    adapter = make_prompt(bench.oracle.base, bench.folder / case.replace(" ", "-"), **CASES[case])
    bench.compare(adapter, bench.prompts(LENGTHS), NEW)


@pytest.mark.parametrize("tokens", [3, 20])
def test_smollm2(real: Bench, tokens: int) -> None:
    adapter = make_prompt(real.oracle.base, real.folder / str(tokens), tokens, scale=0.1)
    real.compare(adapter, real.texts(), 8, WORST_REAL)
