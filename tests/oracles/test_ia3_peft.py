"""IA3 rows of the engine against PEFT: scaled outputs, biased or not, and scaled inputs."""

from typing import Any

import pytest

from tests.fixtures.adapters import make_ia3
from tests.oracles.bench import LENGTHS, NEW, WORST_REAL, Bench, linears


def config(family: str, case: str) -> dict[str, Any]:
    forward = ["mlp.c_proj"] if family == "gpt2" else ["down_proj"]
    if case == "outputs":
        return {"target_modules": linears(family), "feedforward_modules": []}
    if case == "inputs":
        return {"target_modules": linears(family), "feedforward_modules": linears(family)}
    if case == "head":
        return {"target_modules": [*linears(family)[:2], "lm_head"], "feedforward_modules": ["lm_head"]}
    # "usual": what PEFT does by default
    attention = ["c_attn"] if family == "gpt2" else ["k_proj", "v_proj"]
    return {"target_modules": attention + forward, "feedforward_modules": forward}


@pytest.mark.parametrize("case", ["usual", "outputs", "inputs", "head"])
def test_tiny_models(tiny: tuple[str, Bench], case: str) -> None:
    family, bench = tiny
    fields = config(family, case) | {"fan_in_fan_out": family == "gpt2"}
    adapter = make_ia3(bench.oracle.base, bench.folder / case, **fields)
    bench.compare(adapter, bench.prompts(LENGTHS), NEW)


def test_smollm2(real: Bench) -> None:
    adapter = make_ia3(real.oracle.base, real.folder / "ia3", scale=0.1, **config("llama", "usual"))
    real.compare(adapter, real.texts(), 8, WORST_REAL)
