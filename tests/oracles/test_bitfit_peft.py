"""Biases of rows against plain ones: nn.Linear's and the norms' own for BITFIT, PEFT's for BEFT."""

import pytest
from safetensors.torch import load_file

from server.adapters.methods.bitfit import Bitfit, to_beft
from tests.fixtures.adapters import make_beft, make_bitfit
from tests.fixtures.models import logits_of
from tests.oracles.bench import LENGTHS, NEW, TOLERANCE, WORST_REAL, Bench, linears
from tests.server.adapters.methods.small import read

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


@pytest.mark.parametrize("mode", ["absolute", "delta"])
def test_linears_are_exported_for_peft_to_run(tiny: tuple[str, Bench], mode: str) -> None:
    family, bench = tiny
    if family == "gpt2":
        return  # its linears are Conv1D, which BEFT does not know; tests/server/adapters/methods
    adapter = make_bitfit(
        bench.oracle.base, bench.folder / f"own-{mode}", [*linears(family), "lm_head"], mode=mode
    )
    base, method = bench.engine.base, Bitfit()
    spec = method.parse(read(adapter), base)
    tensors = load_file(adapter / "adapter_model.safetensors")
    exported = bench.folder / f"exported-{mode}"
    exported.mkdir()
    for name, data in to_beft(spec, base, tensors, bench.engine.model.weights).items():
        (exported / name).write_bytes(data)
    found = []
    for folder in (adapter, exported):
        with bench.oracle.using(folder) as model:
            found.append(logits_of(model, [5, 6, 7], [8, 9]))
    assert (found[0] - found[1]).abs().max() <= TOLERANCE
    bench.compare(exported, bench.prompts(LENGTHS[:4]), NEW)  # and we read it again


def test_smollm2(real: Bench) -> None:
    adapter = make_bitfit(real.oracle.base, real.folder / "all", [*linears("llama"), "norm"], scale=0.02)
    real.compare(adapter, real.texts(), 8, WORST_REAL)
    adapter = make_beft(real.oracle.base, real.folder / "beft", scale=0.05, target_modules=linears("llama"))
    real.compare(adapter, real.texts(), 8, WORST_REAL)
