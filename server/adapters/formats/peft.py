"""PEFT's adapter_config.json, and our own types in its format, with the method that serves each."""

from dataclasses import replace
from typing import Any, TypeVar

import msgspec

from server.adapters.formats.config_fields import FILE, Fields, OneOf, refused
from server.adapters.formats.peft_configs import (
    BEFT,
    BITFIT,
    IA3,
    LN_TUNING,
    LORA,
    P_TUNING,
    PREFIX_TUNING,
    PROMPT_TUNING,
)
from server.adapters.formats.strict_json import strict_json
from server.errors import InvalidAdapter

MAX_BYTES = 256 << 10

# peft_type -> (the method that serves it, its fields)
TYPES: dict[str, tuple[str, Fields]] = {
    "LORA": ("lora", LORA),
    "PREFIX_TUNING": ("prefix", PREFIX_TUNING),
    "PROMPT_TUNING": ("prompt", PROMPT_TUNING),
    "P_TUNING": ("prompt", P_TUNING),
    "BITFIT": ("bitfit", BITFIT),
    "BEFT": ("bitfit", BEFT),
    "IA3": ("ia3", IA3),
    "LN_TUNING": ("ln_tuning", LN_TUNING),
}
# In every config of PEFT; old versions also saved the `runtime_config` of their process.
COMMON_DROPPED = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "inference_mode",
        "peft_version",
        "revision",
        "runtime_config",
    }
)
# FEATURE_EXTRACTION: some libraries write it for causal models, for which PEFT computes the same.
COMMON_ONE_OF = {
    "task_type": OneOf(
        (None, "CAUSAL_LM", "FEATURE_EXTRACTION"), "an adapter for another task has a head that is not served"
    )
}
MLX_FIELD = "lora_parameters"  # rank, scale and dropout, as mlx-lm writes them

Config = TypeVar("Config", bound=msgspec.Struct)


def read_config(data: bytes) -> dict[str, Any]:
    """The kept fields of an uploaded adapter_config.json; equal adapters give equal dicts.

    Raises InvalidAdapter with the field as param, and TooLarge.
    """
    config = _typed(strict_json(data, FILE, MAX_BYTES))
    return msgspec.json.decode(msgspec.json.encode(config), type=dict[str, Any])


def method_of(config: dict[str, Any]) -> str:
    """The method that serves a config returned by `read_config`."""
    return TYPES[config["peft_type"]][0]


def typed_config(config: dict[str, Any], kind: type[Config]) -> Config:
    """The config as a `kind`, from what PEFT wrote or `read_config` returned. Raises InvalidAdapter."""
    typed = _typed(config)
    if not isinstance(typed, kind):
        raise InvalidAdapter(f"{FILE} has another peft_type than its method.", param="peft_type")
    return typed


def _typed(config: dict[str, Any]) -> msgspec.Struct:
    peft_type = config.get("peft_type")
    if peft_type is None and MLX_FIELD in config:
        raise InvalidAdapter(
            f"{FILE} is mlx-lm's, whose matrices have other names, orientations and scales than PEFT's. "
            "Convert the adapter to PEFT's format.",
            param="peft_type",
        )
    if not isinstance(peft_type, str) or peft_type not in TYPES:
        raise refused("peft_type", peft_type, f"it must be {' or '.join(TYPES)}")
    _, fields = TYPES[peft_type]
    all_fields = replace(
        fields, dropped=fields.dropped | COMMON_DROPPED, one_of={**fields.one_of, **COMMON_ONE_OF}
    )
    return all_fields.read(config)
