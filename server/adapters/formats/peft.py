"""PEFT's adapter_config.json, and ours in its manner: which types are read, and by which method served."""

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
# What every config of PEFT's has; `runtime_config` is of its process, and old versions saved it.
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
# FEATURE_EXTRACTION: around a causal model PEFT computes the same; some libraries write it for those.
COMMON_ONE_OF = {
    "task_type": OneOf(
        (None, "CAUSAL_LM", "FEATURE_EXTRACTION"), "an adapter for another task has a head that is not served"
    )
}
MLX_FIELD = "lora_parameters"  # rank, scale and dropout, as mlx-lm writes them

Config = TypeVar("Config", bound=msgspec.Struct)


def read_config(data: bytes) -> dict[str, Any]:
    """An uploaded adapter_config.json as what is kept of it: equal adapters give equal dicts.

    Raises InvalidAdapter whose `param` is the field.
    """
    config = _typed(strict_json(data, FILE, MAX_BYTES))
    return msgspec.json.decode(msgspec.json.encode(config), type=dict[str, Any])


def method_of(config: dict[str, Any]) -> str:
    """The method that serves a config of ours."""
    return TYPES[config["peft_type"]][0]


def typed_config(config: dict[str, Any], kind: type[Config]) -> Config:
    """A config of this kind. Accepts what PEFT wrote as well as what `read_config` made of it."""
    found = _typed(config)
    if not isinstance(found, kind):
        raise InvalidAdapter(f"{FILE} has another peft_type than its method.", param="peft_type")
    return found


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
    whole = replace(
        fields, dropped=fields.dropped | COMMON_DROPPED, one_of={**fields.one_of, **COMMON_ONE_OF}
    )
    return whole.read(config)
