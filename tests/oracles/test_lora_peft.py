"""LoRA rows of the engine against PEFT: the same greedy tokens, and logits within 1e-4, in fp32.

PEFT runs each row alone, unpadded, and its logits come from one pass without a cache. The engine gets all
rows of a case at once, in chunks small enough to cut prompts in the middle of blocks and windows.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.fixtures.models import make_lora
from tests.oracles.bench import LENGTHS, NEW, WORST_REAL, Bench, linears


def tables(family: str) -> list[str]:
    """The input embedding and the output head."""
    return ["wte", "lm_head"] if family == "gpt2" else ["embed_tokens", "lm_head"]


def pattern(family: str) -> dict[str, Any]:
    """Keys that name one module, a kind of modules, and one layer's."""
    if family == "gpt2":
        return {"rank_pattern": {"h.0.attn.c_attn": 2, "c_fc": 6}, "alpha_pattern": {"mlp.c_proj": 32}}
    return {
        "rank_pattern": {"layers.0.self_attn.v_proj": 2, "up_proj": 6},
        "alpha_pattern": {"q_proj": 32, "^model.layers.1.mlp.down_proj": 1},
    }


def norms(family: str) -> list[str]:
    """Norms of the residual stream, some of every layer and the last."""
    return {"gpt2": ["ln_1", "ln_f"], "olmo2": ["post_attention_layernorm", "model.norm"]}.get(
        family, ["input_layernorm", "model.norm"]
    )


CASES: dict[str, Callable[[str], dict[str, Any]]] = {
    "plain": lambda family: {"r": 4, "lora_alpha": 8, "target_modules": linears(family)},
    "attention only": lambda family: {"r": 8, "target_modules": linears(family)[:2]},
    "one layer": lambda family: {"r": 4, "target_modules": linears(family), "layers_to_transform": [1]},
    "rslora": lambda family: {"r": 8, "lora_alpha": 4, "use_rslora": True, "target_modules": linears(family)},
    "dora": lambda family: {"r": 4, "lora_alpha": 8, "use_dora": True, "target_modules": linears(family)},
    "pattern": lambda family: {"r": 4, "target_modules": linears(family)} | pattern(family),
    "dora rslora pattern": lambda family: (
        {"r": 4, "use_dora": True, "use_rslora": True, "target_modules": linears(family)} | pattern(family)
    ),
    "tables": lambda family: {"r": 4, "target_modules": tables(family)},
    "everything": lambda family: {
        "r": 3,
        "lora_alpha": 6,
        "target_modules": linears(family) + tables(family),
    },
    "trained norms": lambda family: {
        "r": 4,
        "target_modules": linears(family),
        "modules_to_save": norms(family),
    },
    "trained norms and dora": lambda family: {
        "r": 4,
        "use_dora": True,
        "target_modules": linears(family)[:1],
        "modules_to_save": norms(family)[:1],
    },
    "an expression": lambda family: {
        "r": 4,
        "target_modules": r".*\.(?:0|1)\..*(?:" + "|".join(linears(family)[:2]) + ")",
        "exclude_modules": r".*\.1\.(?:self_attn|attn)\.(?:q_proj|c_attn)",
        "rank_pattern": {r"(?:layers|h)\.[01]\..*": 6},
        "alpha_pattern": {"(k_proj|c_proj)": 12},
    },
    "lora_bias": lambda family: {"r": 4, "lora_bias": True, "target_modules": linears(family)},
    "bias all": lambda family: {"r": 4, "bias": "all", "target_modules": linears(family)[:1]},
    "bias lora_only dora": lambda family: {
        "r": 4,
        "bias": "lora_only",
        "use_dora": True,
        "target_modules": linears(family),
    },
}


def make(bench: Bench, family: str, case: str, scale: float = 0.5) -> Path:
    return make_lora(
        bench.oracle.base, bench.folder / case.replace(" ", "-"), scale=scale, **CASES[case](family)
    )


def test_the_base_alone(tiny: tuple[str, Bench]) -> None:
    _family, bench = tiny
    bench.compare(None, bench.prompts(LENGTHS), NEW)


@pytest.mark.parametrize("case", CASES)
def test_tiny_models(tiny: tuple[str, Bench], case: str) -> None:
    family, bench = tiny
    bench.compare(make(bench, family, case), bench.prompts(LENGTHS), NEW)


@pytest.mark.parametrize("case", [None, "plain", "rslora", "dora", "pattern", "everything"])
def test_smollm2(real: Bench, case: str | None) -> None:
    adapter = make(real, "llama", case, scale=0.1) if case else None
    real.compare(adapter, real.texts(), 8, WORST_REAL)
