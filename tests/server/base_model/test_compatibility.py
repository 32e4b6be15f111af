"""What the engine serves, and what it refuses at start by name and reason."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import (
    BertConfig,
    DeepseekV3Config,
    Gemma2Config,
    Gemma3Config,
    Gemma4TextConfig,
    GPT2Config,
    Llama4TextConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    MixtralConfig,
    OpenAIGPTConfig,
    Qwen2Config,
    Qwen3Config,
    RobertaConfig,
    T5Config,
)

from server.base_model.compatibility import check_architecture
from server.errors import StartupError

TINY: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 50,
}
SERVED = [
    LlamaConfig(architectures=["LlamaForCausalLM"], **TINY),
    GPT2Config(architectures=["GPT2LMHeadModel"], n_embd=16, n_layer=2, n_head=4, vocab_size=50),
    Qwen2Config(architectures=["Qwen2ForCausalLM"], **TINY),
    Qwen3Config(architectures=["Qwen3ForCausalLM"], head_dim=4, **TINY),
    MistralConfig(architectures=["MistralForCausalLM"], sliding_window=8, **TINY),
    Gemma2Config(architectures=["Gemma2ForCausalLM"], head_dim=4, **TINY),
]
REFUSED = [
    (T5Config(architectures=["T5ForConditionalGeneration"]), "encoder-decoder"),
    (BertConfig(architectures=["BertForMaskedLM"]), "later tokens"),
    (OpenAIGPTConfig(architectures=["OpenAIGPTLMHeadModel"]), "AttentionInterface"),
    (MambaConfig(architectures=["MambaForCausalLM"]), "state-space layers .*linear_attention"),
    (
        Llama4TextConfig(
            architectures=["Llama4ForCausalLM"],
            moe_layers=[],
            intermediate_size_mlp=24,
            layer_types=["chunked_attention"] * 2,
            **TINY,
        ),
        "afresh with each chunk",
    ),
    (RobertaConfig(architectures=["RobertaForCausalLM"], is_decoder=True), "padding token"),
    (DeepseekV3Config(architectures=["DeepseekV3ForCausalLM"], **TINY), "latents instead of K and V"),
    (Gemma4TextConfig(architectures=["Gemma4ForCausalLM"], head_dim=4, **TINY), "layers differ in head_dim"),
    (Gemma3Config(architectures=["Gemma3ForConditionalGeneration"]), "multimodal"),
    (MixtralConfig(architectures=["MixtralForCausalLM"], num_local_experts=2, **TINY), "mixture of experts"),
    (
        GPT2Config(architectures=["GPT2LMHeadModel"], scale_attn_by_inverse_layer_idx=True),
        "inverse_layer_idx",
    ),
    (GPT2Config(architectures=["GPT2LMHeadModel"], reorder_and_upcast_attn=True), "reorder_and_upcast_attn"),
]


def saved(config: Any, folder: Path) -> Path:
    config.save_pretrained(folder)
    (folder / "model.safetensors").touch()
    return folder


@pytest.mark.parametrize("config", SERVED, ids=lambda c: c.model_type)
def test_the_tested_families_are_served(config: Any, tmp_path: Path) -> None:
    check_architecture(saved(config, tmp_path))


@pytest.mark.parametrize(("config", "reason"), REFUSED, ids=[f"{c.model_type}-{r[:9]}" for c, r in REFUSED])
def test_others_are_refused_by_name_and_reason(config: Any, reason: str, tmp_path: Path) -> None:
    with pytest.raises(StartupError, match=reason) as refusal:
        check_architecture(saved(config, tmp_path))
    assert config.architectures[0] in refusal.value.message


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    folder = saved(SERVED[0], tmp_path)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(StartupError, match=r"LlamaForCausalLM .* no \.safetensors"):
        check_architecture(folder)


def test_remote_code_is_never_run(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    (tmp_path / "evil.py").write_text(f"open({str(canary)!r}, 'w')\nclass EvilConfig: pass\n")
    config = {
        "model_type": "evil",
        "architectures": ["EvilLM"],
        "auto_map": {"AutoConfig": "evil.EvilConfig"},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(StartupError, match=r"EvilLM .* never run"):
        check_architecture(tmp_path)
    assert not canary.exists()


@pytest.mark.parametrize("content", [None, "{", "[]"])
def test_an_unreadable_config_is_a_sentence(content: str | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(StartupError, match=r"config\.json"):
        check_architecture(tmp_path)


UNSOUND: list[tuple[dict[str, Any], str]] = [
    ({"model_type": ["llama"]}, "does not know it"),
    ({"hidden_size": "wide"}, r"does not take its config\.json .*'wide'"),
    ({"hidden_size": 0}, "gives no hidden_size"),
    ({"layer_types": ["full_attention"]}, r"does not take its config\.json .*layer_types"),
    ({"layer_types": [["full_attention"]] * 2}, r"does not take its config\.json"),
    ({"rope_parameters": {"rope_type": "spiral"}}, r"cannot build it from its config\.json .*spiral"),
    ({"hidden_act": "wobble"}, r"cannot build it from its config\.json .*wobble"),
    ({"dtype": "int3"}, "int3"),
    ({"attn_implementation": "wow"}, "wow"),
    ({"id2label": 3}, r"does not take its config\.json"),
]


@pytest.mark.parametrize(("fields", "reason"), UNSOUND, ids=[next(iter(fields)) for fields, _ in UNSOUND])
@pytest.mark.filterwarnings("ignore")
def test_what_transformers_does_not_take_is_a_sentence(
    fields: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"} | TINY | fields))
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(
        StartupError, match=rf"^The architecture .* cannot be served: .*{reason}.*\.$"
    ) as refusal:
        check_architecture(tmp_path)
    assert str(tmp_path) not in refusal.value.message
    assert "\n" not in refusal.value.message
