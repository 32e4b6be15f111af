"""Where a bottleneck adapter may sit: only in layers whose norms stand before their sub-blocks."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    Glm4Config,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    Olmo2Config,
    PhiConfig,
    StableLmConfig,
)

from server.engine.model.forward_context import ForwardContext
from server.engine.model.module_hooks import hook_sublayers
from server.errors import InvalidAdapter
from tests.fixtures.adapters import make_bottleneck
from tests.fixtures.engine import Stand, publish, run, same

TINY: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 50,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
LLAMA = ["model.layers.0.self_attn", "model.layers.0.mlp", "model.layers.1.self_attn", "model.layers.1.mlp"]
GPT2 = ["transformer.h.0.attn", "transformer.h.0.mlp", "transformer.h.1.attn", "transformer.h.1.mlp"]
SITES = [
    (LlamaConfig(**TINY), LLAMA),
    (Gemma2Config(head_dim=4, **TINY), LLAMA),
    (GPT2Config(n_embd=16, n_layer=2, n_head=4, vocab_size=50, bos_token_id=None, eos_token_id=None), GPT2),
    (StableLmConfig(use_parallel_residual=False, **TINY), LLAMA),
    (Olmo2Config(**TINY), []),  # norms behind
    (Glm4Config(head_dim=4, **TINY), []),  # others behind, of names of its own
    (PhiConfig(**TINY), []),  # one norm for both
    (CohereConfig(**TINY), []),
    (StableLmConfig(use_parallel_residual=True, **TINY), []),
    (GPTNeoXConfig(**TINY), []),
]


@pytest.mark.parametrize(("config", "expected"), SITES, ids=[c.model_type for c, _ in SITES])
def test_a_layer_of_another_shape_has_no_place_for_adapters(config: Any, expected: list[str]) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert list(hook_sublayers(model, 2, 16, ForwardContext())) == expected


def test_bottleneck_adapters_are_refused_there_in_a_sentence(
    stand: Callable[..., Stand], tmp_path: Path
) -> None:
    s = stand("olmo2", 2)
    ref = publish(s.objects, s.engine.base, make_bottleneck(s.base, tmp_path / "bottleneck"))
    commands = [s.generate(i, one) for i, one in enumerate((ref, None, *s.refs))]
    refused, *others = run(s.engine, commands)
    assert refused.error is not None
    assert refused.error[0] == InvalidAdapter.code
    assert "olmo2, whose layers have their norms elsewhere" in refused.error[1]
    for done, alone in zip(others, s.alone(commands[1:]), strict=True):
        same(done, alone)
