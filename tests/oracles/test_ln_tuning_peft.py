"""LN_TUNING rows of the engine against PEFT, also where the base's own norm lets nothing through."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.fixtures.adapters import make_ln_tuning
from tests.fixtures.models import build_tiny, load_model
from tests.oracles.bench import LENGTHS, NEW, WORST_REAL, Bench

NORMS = {
    "gpt2": ["ln_1", "ln_2", "ln_f"],
    "olmo2": ["post_attention_layernorm", "post_feedforward_layernorm", "model.norm"],
    "gemma2": ["input_layernorm", "post_feedforward_layernorm", "post_attention_layernorm", "norm"],
}
LLAMA_NORMS = ["input_layernorm", "post_attention_layernorm", "model.norm"]


@pytest.mark.parametrize("which", ["default", "all"])
def test_tiny_models(tiny: tuple[str, Bench], which: str) -> None:
    family, bench = tiny
    names = NORMS.get(family, LLAMA_NORMS)
    targets: dict[str, Any] = {"target_modules": [n for n in names if n != "norm"]}
    if which == "default" and family != "olmo2":  # for which PEFT has none
        targets = {}
    adapter = make_ln_tuning(bench.oracle.base, bench.folder / which, **targets)
    bench.compare(adapter, bench.prompts(LENGTHS), NEW)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_norms_that_are_zero_in_the_base(family: str, tmp_path: Path) -> None:
    """What is zero cannot be scaled to the adapter's value."""
    folder = tmp_path / "model"
    build_tiny(family, folder)
    model = load_model(folder)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 1 and name.endswith("weight"):
                weight[::3] = -1.0 if family == "gemma2" else 0.0  # Gemma multiplies by 1 + weight
                weight[1::3] *= 1e-6
    model.save_pretrained(folder)
    bench = Bench(folder, tmp_path, threads=1, max_batch_tokens=32, max_seqs=8, kv_bytes=4 << 20)
    adapter = make_ln_tuning(bench.oracle.base, tmp_path / "adapter", scale=1.0)
    bench.compare(adapter, bench.prompts(LENGTHS), NEW)
    bench.close()


def test_smollm2(real: Bench) -> None:
    adapter = make_ln_tuning(real.oracle.base, real.folder / "ln", scale=0.01)
    real.compare(adapter, real.texts(), 8, WORST_REAL)
