"""The fields of each adapter config: one struct with the kept fields and one Fields rule for each peft_type.

LoRA (whose patterns are kept as pairs, since their order decides), BitFit, BEFT, IA3, LN_TUNING, prefix
tuning, prompt tuning and P-tuning. peft.py has the table of types.
"""

from typing import Annotated, Literal

import msgspec

from server.adapters.formats.config_fields import NO_SAVED_MODULES, Fields, Modules, OneOf

Rank = Annotated[int, msgspec.Meta(ge=1, le=1 << 16)]
Alpha = Annotated[float, msgspec.Meta(ge=-1e6, le=1e6)]


class LoraConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What is kept of a LoRA config."""

    peft_type: Literal["LORA"]
    r: Rank
    lora_alpha: Alpha
    rank_pattern: tuple[tuple[str, Rank], ...] = ()
    alpha_pattern: tuple[tuple[str, Alpha], ...] = ()
    use_rslora: bool = False
    use_dora: bool = False
    lora_bias: bool = False
    bias: Literal["none", "all", "lora_only"] = "none"
    target_modules: Modules | None = None
    exclude_modules: Modules | None = None
    layers_to_transform: tuple[int, ...] | int | None = None
    modules_to_save: Modules | None = None
    ensure_weight_tying: bool = False


BIASES = OneOf(("none", "all", "lora_only"), "it says which biases of the base were trained")
# Other inits changed the base's weights when training started. After the conversion that the reason names,
# init_lora_weights is true.
INIT = OneOf(
    (True, False, None, "gaussian", "orthogonal", "eva", "mica"),
    "others change the base's weights as training starts, so these matrices alone are not the change; save "
    "with path_initial_model_for_weight_conversion",
)
LORA = Fields(
    LoraConfig,
    # Of the fields about initialisation, only `init_lora_weights` says whether the base was changed.
    dropped=frozenset(
        {
            "corda_config",
            "eva_config",
            "fan_in_fan_out",
            "layers_pattern",
            "loftq_config",
            "lora_dropout",
            "lora_ga_config",
            "megatron_config",
            "megatron_core",
            "qalora_group_size",
        }
    ),
    # These ask for another forward pass, another base or code, or are not served yet.
    empty={
        "alora_invocation_tokens": "the matrices would act from these tokens on only",
        "arrow_config": "it routes each token to adapters of its own",
        "enable_lora": "a fused layer would be adapted in parts",
        "kasa_config": "it takes singular values out of the base's weights",
        "layer_replication": "it builds a base with other layers",
        "merge_weights": "the matrices would be in the base already",
        "monteclora_config": "it draws the matrices at random",
        "target_parameters": "parameters that are no linear layer's weight are not served",
        "trainable_token_indices": "rows of the embedding that are replaced are not served",
        "use_bdlora": "the matrices would be block-diagonal",
        "use_qalora": "inputs would be pooled before the matrices",
        "velora_config": "its own projections would lie beside the matrices",
    },
    one_of={"bias": BIASES, "init_lora_weights": INIT},
    modules=("target_modules", "exclude_modules"),
    pairs=("rank_pattern", "alpha_pattern"),
)


class BitfitConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    peft_type: Literal["BITFIT"]
    bias_mode: Literal["absolute", "delta"]
    target_modules: Modules | None = None


class BeftConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    peft_type: Literal["BEFT"]
    target_modules: Modules | None = None


class Ia3Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`feedforward_modules`: the modules whose inputs are scaled instead of their outputs."""

    peft_type: Literal["IA3"]
    target_modules: Modules | None = None
    exclude_modules: Modules | None = None
    feedforward_modules: Modules | None = None


class LnTuningConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    peft_type: Literal["LN_TUNING"]
    target_modules: Modules | None = None
    exclude_modules: Modules | None = None


BITFIT = Fields(BitfitConfig, modules=("target_modules",))
BEFT = Fields(
    BeftConfig,
    dropped=frozenset({"init_weights"}),
    empty=NO_SAVED_MODULES,
    modules=("target_modules",),
)
IA3 = Fields(
    Ia3Config,
    dropped=frozenset({"fan_in_fan_out", "init_ia3_weights"}),
    empty=NO_SAVED_MODULES,
    modules=("target_modules", "exclude_modules", "feedforward_modules"),
)
LN_TUNING = Fields(
    LnTuningConfig,
    empty=NO_SAVED_MODULES,
    modules=("target_modules", "exclude_modules"),
)


MAX_VIRTUAL = 1024

Count = Annotated[int, msgspec.Meta(ge=1, le=1 << 20)]
Virtual = Annotated[int, msgspec.Meta(ge=1, le=MAX_VIRTUAL)]


class PrefixConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What is kept of a prefix tuning config; heads and token_dim are those of keys and values."""

    peft_type: Literal["PREFIX_TUNING"]
    num_virtual_tokens: Virtual
    token_dim: Count | None = None
    num_layers: Count | None = None
    num_attention_heads: Count | None = None


class PromptConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What is kept of a prompt tuning or P-tuning config."""

    peft_type: Literal["PROMPT_TUNING", "P_TUNING"]
    num_virtual_tokens: Virtual
    token_dim: Count | None = None


ONE_SUBMODULE = {
    "num_transformer_submodules": OneOf((1, None), "more are of an encoder-decoder, which is not served")
}

PREFIX_TUNING = Fields(
    PrefixConfig,
    dropped=frozenset({"encoder_hidden_size", "init_weights", "prefix_projection"}),
    empty=NO_SAVED_MODULES,
    one_of=ONE_SUBMODULE,
)
PROMPT_TUNING = Fields(
    PromptConfig,
    dropped=frozenset(
        {
            "num_attention_heads",
            "num_layers",
            "prompt_tuning_init",
            "prompt_tuning_init_text",
            "tokenizer_kwargs",
            "tokenizer_name_or_path",
        }
    ),
    empty=NO_SAVED_MODULES,
    one_of=ONE_SUBMODULE,
)
P_TUNING = Fields(
    PromptConfig,
    dropped=frozenset(
        {
            "encoder_dropout",
            "encoder_hidden_size",
            "encoder_num_layers",
            "encoder_reparameterization_type",
            "num_attention_heads",
            "num_layers",
        }
    ),
    empty=NO_SAVED_MODULES,
    one_of=ONE_SUBMODULE,
)
