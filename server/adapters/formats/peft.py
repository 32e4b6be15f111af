"""PEFT's adapter_config.json as a closed list of fields. Nothing of it is run, imported or fetched.

A field is kept because it changes what the adapter computes, is dropped because it cannot, or must hold
its default because what it asks for is not served. A field that is in no list is refused: silence would
change outputs. Kept as pairs are the patterns, whose order decides.
"""

from typing import Annotated, Any, Literal

import msgspec

from server.adapters.formats.strict import strict_json
from server.errors import InvalidAdapter, shown

FILE = "adapter_config.json"
MAX_BYTES = 256 << 10
MAX_TEXT = 1024
METHOD_OF_TYPE = {"LORA": "lora"}

# Say how the adapter was made, or where from; nothing is looked up there.
DROPPED = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "eva_config",
        "fan_in_fan_out",
        "inference_mode",
        "layers_pattern",
        "lora_dropout",
        "megatron_core",
        "peft_version",
        "qalora_group_size",
        "revision",
    }
)
# Ask for another forward pass, another base, or code; or are served by no method yet.
MUST_BE_EMPTY = frozenset(
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
)
MUST_BE_ONE_OF: dict[str, tuple[object, ...]] = {
    "bias": ("none",),
    "task_type": (None, "CAUSAL_LM"),
    "init_lora_weights": (True, False, None, "gaussian", "orthogonal", "eva"),  # others change the base
}

ModuleName = Annotated[str, msgspec.Meta(pattern=r"\A[A-Za-z0-9_.-]{1,256}\Z")]
Rank = Annotated[int, msgspec.Meta(ge=1, le=1 << 16)]
Alpha = Annotated[float, msgspec.Meta(ge=-1e6, le=1e6)]
Modules = Annotated[tuple[ModuleName, ...], msgspec.Meta(max_length=10_000)]


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
    target_modules: Modules | None = None
    exclude_modules: Modules | None = None
    layers_to_transform: tuple[int, ...] | int | None = None
    modules_to_save: Modules | None = None


def read_config(data: bytes) -> dict[str, Any]:
    """An uploaded adapter_config.json as what is kept of it: equal adapters give equal dicts.

    Raises InvalidAdapter whose `param` is the field.
    """
    config = lora_config(strict_json(data, FILE, MAX_BYTES))
    return msgspec.json.decode(msgspec.json.encode(config), type=dict[str, Any])


def method_of(config: dict[str, Any]) -> str:
    """The method that serves a config of ours."""
    return METHOD_OF_TYPE[config["peft_type"]]


def lora_config(config: dict[str, Any]) -> LoraConfig:
    """Accepts what PEFT wrote as well as what `read_config` made of it."""
    peft_type = config.get("peft_type")
    if not isinstance(peft_type, str) or peft_type not in METHOD_OF_TYPE:
        raise _refused("peft_type", peft_type, f"it must be {' or '.join(METHOD_OF_TYPE)}")
    kept = {field: value for field, value in config.items() if _is_kept(field, value)}
    for field in ("rank_pattern", "alpha_pattern"):
        if isinstance(kept.get(field), dict):
            kept[field] = list(kept[field].items())
        elif kept.get(field, ()) is None:
            del kept[field]
    for field in ("target_modules", "exclude_modules"):
        kept[field] = _modules(field, kept.get(field))
    try:
        return msgspec.convert(kept, LoraConfig)
    except msgspec.ValidationError as error:
        raise InvalidAdapter(f"{FILE}: {error}.", param="adapter_config") from error


def _is_kept(field: str, value: Any) -> bool:
    """False for a field to drop; raises for one that must not be there, or not so."""
    if field in LoraConfig.__struct_fields__:
        return True
    if field in DROPPED:
        _check_inert(field, value)
    elif field in MUST_BE_EMPTY:
        if value not in (None, False, {}, []):
            raise _refused(field, value, "it is not served and must be null")
    elif field in MUST_BE_ONE_OF:
        allowed = MUST_BE_ONE_OF[field]
        if not any(value is one or (isinstance(one, str) and value == one) for one in allowed):
            raise _refused(field, value, f"it must be {' or '.join(map(_json, allowed))}")
    else:
        raise InvalidAdapter(f"{FILE} has a field {shown(field)} that is not known.", param=FILE)
    return False


def _modules(field: str, value: Any) -> list[str] | None:
    """PEFT takes a string for a regular expression, except this one, and a list in no order for a set."""
    if value is None or value == "all-linear":
        return None
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise _refused(field, value, "it must be a list of module names, not a pattern")
    return sorted(set(value))


def _check_inert(field: str, value: Any) -> None:
    """Dropped all the same, but a URL or a heap of data was put there for a reason that is not ours."""
    flat = list(value.values()) if isinstance(value, dict) else value
    for item in flat if isinstance(flat, list) else [flat]:
        if isinstance(item, dict | list):
            raise _refused(field, value, "it must be a plain value")
        if isinstance(item, str) and (len(item) > MAX_TEXT or "://" in item):
            raise _refused(field, item, f"it must be text of at most {MAX_TEXT} characters and no URL")


def _refused(field: str, value: object, rule: str) -> InvalidAdapter:
    return InvalidAdapter(f"{FILE} has {field} {shown(value)}; {rule}.", param=field)


def _json(value: object) -> str:
    return msgspec.json.encode(value).decode()
