"""An uploaded config as a closed list of fields. Nothing in it is run, imported, fetched or compiled.

A field is kept if it changes what the adapter computes, and dropped if it cannot; one that asks for something
not served must be empty. Libraries add fields with every release: an unknown field is dropped if it is empty
and refused otherwise, since ignoring it could change outputs.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Annotated, Any, NamedTuple

import msgspec

from server.errors import InvalidAdapter, shown

FILE = "adapter_config.json"
CLIPPED_END = 100  # characters kept of each end of a long message

MODULE_NAME = r"\A[A-Za-z0-9_.-]{1,256}\Z"
ModuleName = Annotated[str, msgspec.Meta(pattern=MODULE_NAME)]
Modules = Annotated[tuple[ModuleName, ...], msgspec.Meta(max_length=10_000)]

NO_SAVED_MODULES = {"modules_to_save": "whole modules of the base cannot be replaced beside this method"}


class OneOf(NamedTuple):
    """The allowed values of a field, and why any other would change outputs."""

    values: tuple[object, ...]
    reason: str

    def allows(self, value: object) -> bool:
        """Whether `value` is one of them, of the same JSON type: 1 is not true."""
        return any(type(value) is type(one) and value == one for one in self.values)


@dataclass(frozen=True)
class Fields:
    """The fields that one type of adapter may have."""

    kept: type[msgspec.Struct]  # frozen, forbids unknown fields
    dropped: frozenset[str] = frozenset()  # says how the adapter was made, or where it comes from
    empty: Mapping[str, str] = field(default_factory=dict)  # must be empty; name -> why
    one_of: Mapping[str, OneOf] = field(default_factory=dict)
    modules: tuple[str, ...] = ()  # kept; sets of module names
    pairs: tuple[str, ...] = ()  # kept; mappings whose order matters

    def read(self, config: dict[str, Any]) -> msgspec.Struct:
        """Read a config as a library wrote it, or as `kept` encodes. InvalidAdapter names the field."""
        kept = {name: value for name, value in config.items() if self._is_kept(name, value)}
        for name in self.pairs:
            if isinstance(kept.get(name), dict):
                kept[name] = list(kept[name].items())
            elif kept.get(name, ()) is None:
                del kept[name]
        for name in self.modules:
            kept[name] = _modules(name, kept.get(name))
        for name in _flags(self.kept) & kept.keys():
            if kept[name] is None:  # the libraries treat null as false
                kept[name] = False
        try:
            return msgspec.convert(kept, self.kept)
        except msgspec.ValidationError as error:
            raise InvalidAdapter(f"{FILE}: {_clipped(str(error))}.", param="adapter_config") from error

    def _is_kept(self, name: str, value: Any) -> bool:
        """Whether to keep the field, or drop it. Raises InvalidAdapter if the value is not served."""
        if (one_of := self.one_of.get(name)) and not one_of.allows(value):
            allowed = " or ".join(map(_json, one_of.values))
            raise refused(name, value, f"it must be {allowed}: {one_of.reason}")
        if name in self.kept.__struct_fields__:
            return True
        if name in self.dropped or name in self.one_of or asks_for_nothing(value):
            return False
        if name in self.empty:
            raise refused(name, value, f"it must be null: {self.empty[name]}")
        raise InvalidAdapter(
            f"{FILE} has a field {shown(name)} that is not known, with the value {shown(value)}; without "
            "what it asks for, outputs may be others.",
            param=FILE,
        )


def asks_for_nothing(value: object) -> bool:
    """Whether a field with this value is as good as absent."""
    return value is None or value is False or value in ("", [], {})


def refused(name: str, value: object, rule: str) -> InvalidAdapter:
    return InvalidAdapter(f"{FILE} has {name} {shown(value)}; {rule}.", param=name)


def _modules(name: str, value: Any) -> list[str] | None:
    """Module names, sorted and without impossible ones; None for null and for an expression.

    An expression (a string) chose the modules when training started. It is not evaluated: the tensors show
    which modules were trained.
    """
    if value is None or isinstance(value, str):
        return None
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise refused(name, value, "it must be a list of module names or one expression")
    return sorted({item for item in value if re.fullmatch(MODULE_NAME, item)})


@cache
def _flags(kind: type[msgspec.Struct]) -> frozenset[str]:
    """The names of boolean fields."""
    return frozenset(found.name for found in msgspec.structs.fields(kind) if found.type is bool)


def _clipped(text: str) -> str:
    """A message of msgspec's, which quotes the input and ends with its path, as short ASCII."""
    escaped = ascii(text)[1:-1]
    return (
        escaped if len(escaped) <= 2 * CLIPPED_END else f"{escaped[:CLIPPED_END]}...{escaped[-CLIPPED_END:]}"
    )


def _json(value: object) -> str:
    return msgspec.json.encode(value).decode()
