"""Biases of rows against plain ones: nn.Linear's and the norms' own for BITFIT, PEFT's for BEFT."""

import pytest

from tests.fixtures.adapters import make_beft, make_bitfit
from tests.oracles.bench import LENGTHS, NEW, WORST_REAL, Bench, linears

NORMS = ["norm", "ln_1", "ln_2", "ln_f", "input_layernorm", "post_attention_layernorm"]


@pytest.mark.parametrize("mode", ["absolute", "delta"])
@pytest.mark.parametrize("which", ["linears", "norms", "all"])
def test_tiny_models(tiny: tuple[str, Bench], which: str, mode: str) -> None:
    family, bench = tiny
    inner = ("q_norm", "k_norm")
    found = [name for name, _ in bench.oracle.base.named_modules() if not name.endswith(inner)]
    wanted = {"linears": linears(family), "norms": NORMS, "all": [*linears(family), *NORMS, "lm_head"]}[which]
    modules = [name for name in found if name.endswith(tuple(wanted))]
    adapter = make_bitfit(bench.oracle.base, bench.folder / f"{which}-{mode}", modules, mode=mode)
    bench.compare(adapter, bench.prompts(LENGTHS), NEW)


def test_beft(tiny: tuple[str, Bench]) -> None:
    family, bench = tiny
    targets = ["lm_head"] if family == "gpt2" else [*linears(family), "lm_head"]  # PEFT refuses Conv1D
    adapter = make_beft(bench.oracle.base, bench.folder / "beft", target_modules=targets)
    bench.compare(adapter, bench.prompts(LENGTHS), NEW)


def test_smollm2(real: Bench) -> None:
    adapter = make_bitfit(real.oracle.base, real.folder / "all", [*linears("llama"), "norm"], scale=0.02)
    real.compare(adapter, real.texts(), 8, WORST_REAL)
    adapter = make_beft(real.oracle.base, real.folder / "beft", scale=0.05, target_modules=linears("llama"))
    real.compare(adapter, real.texts(), 8, WORST_REAL)
