"""Tiny configs of every causal language model that the installed transformers knows.

A case is a family's defaults, shrunk to four layers, hidden size 64 and 300 tokens. Families that this does
not fit have a line in OVERRIDES; what a family can look like beside its defaults stands in VARIANTS.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tests.fixtures.models import INIT, VOCABULARY

CONTEXT = 512
LAYERS = 4
WINDOW = 8
ORIGINAL = 32  # positions before a rope is scaled: prompts of 90 and 200 tokens pass it, 7 and 17 do not

# Each where the family has such a field and its default is set.
SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": CONTEXT,
    "sliding_window": WINDOW,
    "initializer_range": INIT,
    "init_std": INIT,
    "query_pre_attn_scalar": 16,
    # of kinds that are refused: small enough to build in no time
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 96,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
}
EVEN_IF_NONE = {"num_key_value_heads", "head_dim", "n_routed_experts", "num_experts_per_tok"}
TOKENS = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}


@dataclass(frozen=True)
class Case:
    name: str
    model_type: str
    fields: Mapping[str, Any]  # all that its config.json sets

    def write(self, folder: Path) -> None:
        """The config.json of a model folder; whether transformers takes it is not asked."""
        architecture = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[self.model_type]
        config = {"model_type": self.model_type, "architectures": [architecture], **self.fields}
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(config))


def shrunk(model_type: str) -> dict[str, Any]:
    """The fields of SHAPE that this family has, by its own names; its kinds of layer, in turn."""
    kind = CONFIG_MAPPING[model_type]
    try:
        usual = kind()
    except Exception:  # noqa: BLE001 (a family without usable defaults: OVERRIDES has all it needs)
        return {}
    names = getattr(kind, "attribute_map", {})
    has = usual.to_dict()
    found = {}
    for name, value in SHAPE.items():
        own = names.get(name, name)
        if own in has and (has[own] is not None or name in EVEN_IF_NONE):
            found[own] = value
    own = names.get("layer_types", "layer_types")
    if has.get(own):
        found[own] = in_turn(has[own])
    return found


def in_turn(kinds: list[str]) -> list[str]:
    """LAYERS layers, of each kind as many."""
    different = list(dict.fromkeys(kinds))
    return [different[i % len(different)] for i in range(LAYERS)]


SEQ2SEQ = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
OVERRIDES: dict[str, dict[str, Any]] = {
    "codegen": {"rotary_dim": 8},
    "cohere_compass_text": {
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 10000.0}
            for kind in ("full_attention", "sliding_attention")
        }
    },
    "dbrx": {
        "attn_config": {"rope_theta": 10000.0},
        "ffn_config": {"hidden_size": 64, "ffn_hidden_size": 96},
    },
    "dots1": {"n_shared_experts": 1},
    "dots3_note_text": {"num_attention_heads": ..., "num_key_value_heads": ...},
    "gemma3n_text": {
        "num_kv_shared_layers": 0,
        "hidden_size_per_layer_input": 16,
        "vocab_size_per_layer_input": VOCABULARY,
        "laurel_rank": 8,
    },
    "gemma4_text": {
        "global_head_dim": 16,
        "hidden_size_per_layer_input": 16,
        "vocab_size_per_layer_input": VOCABULARY,
    },
    "gemma4_unified_text": {"global_head_dim": 16},
    "gemma4_assistant": {"text_config": {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "window_size": WINDOW},
    "gpt_bigcode": {"num_key_value_heads": ...},
    "gptj": {"rotary_dim": 8},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 1},
    "modernbert-decoder": {"pad_token_id": 0},
    "musicgen": {"text_encoder": {"model_type": "t5"}, "audio_encoder": {"model_type": "encodec"}},
    "plbart": SEQ2SEQ,
    "prophetnet": {"num_hidden_layers": ..., "num_encoder_layers": 2, "num_decoder_layers": 2},
    "reformer": {"is_decoder": True, "axial_pos_embds_dim": [16, 48]},
    "whisper": SEQ2SEQ,
    "xlnet": {"max_position_embeddings": ...},
    "zamba2": {"layers_block_type": ["mamba", "hybrid"] * 2},
    "zaya": {"num_experts_per_tok": 1},
}


def rope(kind: str, **fields: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **fields}}


ROPES: dict[str, dict[str, Any]] = {
    "linear rope": rope("linear", factor=4.0),
    "dynamic rope": rope("dynamic", factor=4.0, original_max_position_embeddings=ORIGINAL),
    "yarn": rope("yarn", factor=8.0, original_max_position_embeddings=ORIGINAL),
    "llama3 rope": rope(
        "llama3",
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=ORIGINAL,
    ),
    "longrope": rope(
        "longrope",
        short_factor=[1.0 + i / 8 for i in range(8)],
        long_factor=[2.0 + i for i in range(8)],
        factor=16.0,
        original_max_position_embeddings=ORIGINAL,
    ),
}
DECODER = {"is_decoder": True}
FULL = {"layer_types": ["full_attention"] * LAYERS}
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "bert": {"decoder": DECODER},
    "roberta": {"decoder": DECODER | {"pad_token_id": 1}},
    "xlm-roberta": {"decoder": DECODER | {"pad_token_id": 1}},
    "electra": {"decoder": DECODER},
    "gemma3n_text": {"shared K and V": {"num_kv_shared_layers": 2}},
    "gemma4_text": {
        "other head size": {"global_head_dim": 32},
        "no layer inputs": {"hidden_size_per_layer_input": 0},
        "K is V": {"attention_k_eq_v": True},
        "shared K and V": {"num_kv_shared_layers": 2},
        "experts": {
            "enable_moe_block": True,
            "num_experts": 4,
            "top_k_experts": 2,
            "moe_intermediate_size": 32,
        },
    },
    "falcon": {"alibi": {"alibi": True}, "new": {"new_decoder_architecture": True}},
    "gpt2": {
        "inverse layer": {"scale_attn_by_inverse_layer_idx": True},
        "upcast": {"reorder_and_upcast_attn": True},
        "wrong head_dim": {"head_dim": 32},
        "wrong kv heads": {"num_key_value_heads": 1},
    },
    "gpt_bigcode": {"many queries": {"multi_query": False, "num_key_value_heads": 4}},
    "gpt_neox": {"sequential": {"use_parallel_residual": False}},
    "granite": {
        "multipliers": {
            "embedding_multiplier": 3.0,
            "logits_scaling": 2.0,
            "residual_multiplier": 0.5,
            "attention_multiplier": 0.1,
        }
    },
    "granitemoehybrid": {
        "dense attention": FULL
        | {"num_local_experts": 0, "num_experts_per_tok": 0, "shared_intermediate_size": 96}
    },
    "lfm2": {"convolutions": {"layer_types": ["conv", "full_attention"] * 2}},
    "llama": ROPES
    | {
        "biases": {"attention_bias": True, "mlp_bias": True},
        "tied": {"tie_word_embeddings": True},
        "wide heads": {"head_dim": 32},
        "odd heads": {"head_dim": 20},
        "short context": {"max_position_embeddings": 64},
        "one kv head": {"num_key_value_heads": 1},
    },
    "llama4_text": {"dense, full attention": FULL | {"moe_layers": [], "intermediate_size_mlp": 96}},
    "ministral3": {
        "short": rope(
            "yarn",
            factor=16.0,
            original_max_position_embeddings=ORIGINAL,
            beta_fast=32.0,
            beta_slow=1.0,
            mscale=1.0,
            mscale_all_dim=1.0,
            llama_4_scaling_beta=0.1,
        )
    },
    "mistral": {"no window": {"sliding_window": None}},
    "olmo": {"clipped": {"clip_qkv": 0.5}},
    "olmo3": {"yarn": ROPES["yarn"]},
    "opt": {"as 350m": {"word_embed_proj_dim": 32, "do_layer_norm_before": False}},
    "phi3": {
        "longrope": ROPES["longrope"] | {"original_max_position_embeddings": ORIGINAL},
        "window": {"sliding_window": WINDOW},
        "half rope": rope("default", partial_rotary_factor=0.5) | {"tie_word_embeddings": True},
    },
    "qwen2": {
        "window": {"use_sliding_window": True, "max_window_layers": 2, "sliding_window": WINDOW},
        "yarn": ROPES["yarn"],
    },
    "qwen3": {"yarn": ROPES["yarn"], "dynamic rope": ROPES["dynamic rope"]},
    "smollm3": {"window": {"use_sliding_window": True, "sliding_window": WINDOW}},
    "stablelm": {"head norms": {"qk_layernorm": True}, "parallel": {"use_parallel_residual": True}},
}


def cases() -> Iterator[Case]:
    """Every family by its defaults, then what else it can look like."""
    for model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        for variant in ("", *VARIANTS.get(model_type, {})):
            yield case_of(f"{model_type}:{variant}" if variant else model_type)


def case_of(name: str) -> Case:
    """MODEL_TYPE, or MODEL_TYPE:VARIANT."""
    model_type, _, variant = name.partition(":")
    fields = TOKENS | shrunk(model_type) | OVERRIDES.get(model_type, {})
    if variant:
        fields |= VARIANTS[model_type][variant]
    return Case(name, model_type, {name: value for name, value in fields.items() if value is not ...})
