"""Random configs of families that are served: whatever they set, the answer is exact or a refusal."""

import random
from typing import Any

from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tests.families.cases import TOKENS, Case
from tests.fixtures.models import INIT

# fmt: off
FAMILIES = [
    "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "gemma4_text", "phi", "phi3",
    "granite", "olmo", "olmo2", "olmo3", "glm", "glm4", "cohere", "cohere2", "starcoder2", "gpt_neox",
    "smollm3", "stablelm", "exaone4", "helium", "ministral", "ministral3", "nemotron", "persimmon",
    "seed_oss", "arcee", "apertus", "hunyuan_v1_dense", "ernie4_5", "internlm3", "cwm", "vaultgemma",
    "jais2", "hyperclovax", "gpt2", "gpt_bigcode", "opt", "gptj", "codegen", "biogpt",
]
# fmt: on
FLAGS = [False, True]
EPSILONS = [1e-6, 1e-5, 1e-2]
FACTORS = [0.25, 1.0, 3.0]
ACTIVATIONS = ["silu", "gelu", "gelu_pytorch_tanh", "gelu_new", "relu", "relu2"]
# What a field may be set to, where the family has it, by transformers' usual name.
CHOICES: dict[str, list[Any]] = {
    "num_hidden_layers": [1, 2, 3],
    "intermediate_size": [40, 96, 100],
    "vocab_size": [50, 257, 300],
    "max_position_embeddings": [64, 130, 512],
    "sliding_window": [None, 1, 3, 8, 16, 33],
    "use_sliding_window": FLAGS,
    "max_window_layers": [0, 1, 2],
    "tie_word_embeddings": FLAGS,
    "attention_bias": FLAGS,
    "mlp_bias": FLAGS,
    "use_bias": FLAGS,
    "use_qkv_bias": FLAGS,
    "bias": FLAGS,
    "enable_bias": FLAGS,
    "layer_norm_elementwise_affine": FLAGS,
    "do_layer_norm_before": FLAGS,
    "qk_layernorm": FLAGS,
    "use_qk_norm": FLAGS,
    "use_parallel_residual": FLAGS,
    "multi_query": FLAGS,
    "scale_embedding": FLAGS,
    "scale_attn_weights": FLAGS,
    "scale_attn_by_inverse_layer_idx": FLAGS,
    "attention_k_eq_v": FLAGS,
    "hidden_act": ACTIVATIONS,
    "hidden_activation": ACTIVATIONS,
    "activation_function": ACTIVATIONS,
    "rms_norm_eps": EPSILONS,
    "layer_norm_eps": EPSILONS,
    "layer_norm_epsilon": EPSILONS,
    "norm_eps": EPSILONS,
    "clip_qkv": [None, 0.5],
    "attn_logit_softcapping": [None, 2.0, 50.0],
    "final_logit_softcapping": [None, 3.0],
    "query_pre_attn_scalar": [8, 16, 100],
    "embedding_multiplier": FACTORS,
    "logits_scaling": FACTORS,
    "residual_multiplier": FACTORS,
    "attention_multiplier": FACTORS,
    "logit_scale": FACTORS,
    "rotary_dim": [4, 8],
    "word_embed_proj_dim": [None, 32],
    "num_kv_shared_layers": [0, 0, 1],
    "hidden_size_per_layer_input": [0, 8],
    "no_rope_layers": [None, [1, 0, 1]],
    "global_head_dim": [16, 32],
}
SEED = "seed "  # a case's name is this and its number
ALWAYS = {"num_hidden_layers", "vocab_size", "intermediate_size", "sliding_window", "num_kv_shared_layers"}
ROPES = ["default", "linear", "dynamic", "yarn", "llama3", "longrope"]


def hostile(seed: int) -> Case:
    """The config of this seed."""
    rng = random.Random(seed)
    family = rng.choice(FAMILIES)
    kind = CONFIG_MAPPING[family]
    usual = kind().to_dict()
    names = getattr(kind, "attribute_map", {})
    fields = (
        TOKENS
        | {"initializer_range": INIT, "init_std": INIT, "vocab_size_per_layer_input": 300}
        | _shape(rng)
    )
    for name, choices in CHOICES.items():
        if name in ALWAYS or rng.random() < 0.5:
            fields[name] = rng.choice(choices)
    if rng.random() < 0.7:
        fields["layer_types"] = [
            rng.choice(["full_attention", "sliding_attention"]) for _ in range(fields["num_hidden_layers"])
        ]
    if rng.random() < 0.5:
        fields["rope_parameters"] = _ropes(rng, usual.get("rope_parameters"), fields["head_dim"])
    lies = rng.random() < 0.1  # fields that the family does not have, which its class never looks at
    fields = {names.get(name, name): value for name, value in fields.items()}
    fields = {
        name: value for name, value in fields.items() if lies or name in usual or name == "global_head_dim"
    }
    return Case(f"{SEED}{seed}", family, fields)


def _shape(rng: random.Random) -> dict[str, Any]:
    """Heads that fit together, and a hidden size that may be other than all of them."""
    kv_heads, group, head_dim = (
        rng.choice([1, 2, 3]),
        rng.choice([1, 2, 4]),
        rng.choice([4, 8, 16, 20, 32, 64, 128]),
    )
    heads = kv_heads * group
    hidden = heads * head_dim
    return {
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "hidden_size": hidden if hidden <= 256 else heads * 16,
    }


def _ropes(rng: random.Random, usual: Any, head_dim: int) -> dict[str, Any]:
    """Parameters of one rope, or of one for each kind of layer."""
    if usual and all(isinstance(value, dict) for value in usual.values()):
        return {kind: _rope(rng, head_dim) for kind in usual}
    return _rope(rng, head_dim)


def _rope(rng: random.Random, head_dim: int) -> dict[str, Any]:
    kind = rng.choice(ROPES)
    original = rng.choice([16, 32, 100])
    partial = rng.choice([0.5, 1.0, 1.0])
    fields: dict[str, Any] = {"partial_rotary_factor": partial} if partial < 1 else {}
    if kind != "default":
        fields["factor"] = rng.choice([1.0, 2.0, 8.0])
    if kind in ("yarn", "llama3", "longrope", "dynamic"):
        fields["original_max_position_embeddings"] = original
    if kind == "llama3":
        fields |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    if kind == "longrope":
        pairs = int(head_dim * partial) // 2
        fields["short_factor"] = [1.0 + rng.random() for _ in range(pairs)]
        fields["long_factor"] = [2.0 + 3.0 * rng.random() for _ in range(pairs)]
    return {"rope_type": kind, "rope_theta": 10000.0, **fields}
