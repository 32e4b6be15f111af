"""PEFT's LoRA config. Kept as pairs are the patterns, whose order decides."""

from typing import Annotated, Literal

import msgspec

from server.adapters.formats.fields import Fields, Modules

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


LORA = Fields(
    LoraConfig,
    dropped=frozenset(
        {
            "eva_config",
            "fan_in_fan_out",
            "layers_pattern",
            "lora_dropout",
            "megatron_core",
            "qalora_group_size",
        }
    ),
    # Ask for another forward pass, another base, or code; or are served by no method yet.
    empty=frozenset(
        {
            "alora_invocation_tokens",
            "arrow_config",
            "corda_config",
            "enable_lora",
            "ensure_weight_tying",
            "kasa_config",
            "layer_replication",
            "loftq_config",
            "lora_ga_config",
            "megatron_config",
            "merge_weights",
            "monteclora_config",
            "target_parameters",
            "trainable_token_indices",
            "use_bdlora",
            "use_qalora",
            "velora_config",
        }
    ),
    one_of={
        "bias": ("none", "all", "lora_only"),
        "init_lora_weights": (True, False, None, "gaussian", "orthogonal", "eva"),  # others change the base
    },
    modules=("target_modules", "exclude_modules"),
    pairs=("rank_pattern", "alpha_pattern"),
)
