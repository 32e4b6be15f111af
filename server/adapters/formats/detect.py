"""Detects which library wrote an adapter_config.json, and which method serves it."""

from typing import Any

import msgspec

from server.adapters.formats import peft
from server.adapters.formats.adapterhub import adapterhub_config
from server.adapters.formats.config_fields import FILE
from server.adapters.formats.strict_json import strict_json

MAX_BYTES = peft.MAX_BYTES


def read_config(data: bytes) -> dict[str, Any]:
    """The kept fields of an uploaded config; equal adapters give equal dicts.

    Raises InvalidAdapter with the field as param, and TooLarge.
    """
    raw = strict_json(data, FILE, MAX_BYTES)
    if not _is_hub(raw):
        return peft.read_config(data)
    return msgspec.json.decode(msgspec.json.encode(adapterhub_config(raw)), type=dict[str, Any])


def method_of(config: dict[str, Any]) -> str:
    """The method that serves a config returned by `read_config`."""
    return "bottleneck" if _is_hub(config) else peft.method_of(config)


def _is_hub(config: dict[str, Any]) -> bool:
    """PEFT always writes `peft_type` at the top level; AdapterHub nests the method's fields in `config`."""
    return "peft_type" not in config and {"config", "model_type"} <= config.keys()
