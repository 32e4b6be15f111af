"""Configs of the adapters that are one vector a module: BitFit, PEFT's BEFT, IA3 and LN_TUNING.

BITFIT is ours, in PEFT's manner, as no library saves biases alone: tensors `base_model.model.MODULE.bias`,
which replace the base's (`absolute`) or are added to them (`delta`).
"""

from typing import Literal

import msgspec

from server.adapters.formats.config_fields import NO_SAVED_MODULES, Fields, Modules


class BitfitConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    peft_type: Literal["BITFIT"]
    bias_mode: Literal["absolute", "delta"]
    target_modules: Modules | None = None


class BeftConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    peft_type: Literal["BEFT"]
    target_modules: Modules | None = None


class Ia3Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`feedforward_modules`: those whose inputs are scaled, not their outputs."""

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
