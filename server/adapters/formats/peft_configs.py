"""PEFT's LoRA config. Kept as pairs are the patterns, whose order decides."""

from typing import Annotated, Literal

import msgspec

from server.adapters.formats.config_fields import Fields, Modules, OneOf

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
# They changed the base as training began. Converted as the sentence says, an adapter's init is true.
INIT = OneOf(
    (True, False, None, "gaussian", "orthogonal", "eva", "mica"),
    "others change the base's weights as training starts, so these matrices alone are not the change; save "
    "with path_initial_model_for_weight_conversion",
)
LORA = Fields(
    LoraConfig,
    # Of the settings of inits, `init_lora_weights` alone says whether the base was changed.
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
    # Ask for another forward pass, another base, or code; or are served by no method yet.
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
