"""A tenant's config as a closed list of fields. Nothing of it is run, imported, fetched or compiled.

A field is kept because it changes what the adapter computes, is dropped because it cannot, or must ask for
nothing because what it asks for is not served. Libraries add fields with every release: one in no list is
dropped while it asks for nothing, and refused as soon as it asks for something, since to ignore that would
change outputs.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Annotated, Any, NamedTuple

import msgspec

from server.errors import InvalidAdapter, shown

FILE = "adapter_config.json"
CLIP = 100  # characters of each end of a long explanation

MODULE_NAME = r"\A[A-Za-z0-9_.-]{1,256}\Z"
ModuleName = Annotated[str, msgspec.Meta(pattern=MODULE_NAME)]
Modules = Annotated[tuple[ModuleName, ...], msgspec.Meta(max_length=10_000)]

NO_SAVED_MODULES = {"modules_to_save": "whole modules of the base cannot be replaced beside this method"}


class OneOf(NamedTuple):
    """The values that a field may have, and why any other would change outputs."""

    values: tuple[object, ...]
    reason: str

    def allows(self, value: object) -> bool:
        """JSON's types are told apart: 1 is not true."""
        return any(type(value) is type(one) and value == one for one in self.values)


@dataclass(frozen=True)
class Fields:
    """Every field that one type of adapter may have."""

    kept: type[msgspec.Struct]  # frozen, forbids unknown fields
    dropped: frozenset[str] = frozenset()  # says how the adapter was made, or where from
    empty: Mapping[str, str] = field(default_factory=dict)  # asks for what is not served: why that matters
    one_of: Mapping[str, OneOf] = field(default_factory=dict)
    modules: tuple[str, ...] = ()  # kept: names of modules, in no order
    pairs: tuple[str, ...] = ()  # kept: a mapping whose order decides

    def read(self, config: dict[str, Any]) -> msgspec.Struct:
        """Accepts what a library wrote as well as what `kept` encodes to. Raises InvalidAdapter by field."""
        kept = {name: value for name, value in config.items() if self._is_kept(name, value)}
        for name in self.pairs:
            if isinstance(kept.get(name), dict):
                kept[name] = list(kept[name].items())
            elif kept.get(name, ()) is None:
                del kept[name]
        for name in self.modules:
            kept[name] = _modules(name, kept.get(name))
        for name in _flags(self.kept) & kept.keys():
            if kept[name] is None:  # which the libraries' own code takes for false
                kept[name] = False
        try:
            return msgspec.convert(kept, self.kept)
        except msgspec.ValidationError as error:
            raise InvalidAdapter(f"{FILE}: {_clipped(str(error))}.", param="adapter_config") from error

    def _is_kept(self, name: str, value: Any) -> bool:
        """False for a field to drop; raises for one that must not be there, or not so."""
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
    """Whether a field with this value asks as little as one that is not there."""
    return value is None or value is False or value in ("", [], {})


def refused(name: str, value: object, rule: str) -> InvalidAdapter:
    return InvalidAdapter(f"{FILE} has {name} {shown(value)}; {rule}.", param=name)


def _modules(name: str, value: Any) -> list[str] | None:
    """A list in no order stands for a set; what no module can be called names none.

    A string is an expression that chose the modules when training began. It is not evaluated: which modules
    were trained, the tensors say.
    """
    if value is None or isinstance(value, str):
        return None
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise refused(name, value, "it must be a list of module names or one expression")
    return sorted({item for item in value if re.fullmatch(MODULE_NAME, item)})


@cache
def _flags(kind: type[msgspec.Struct]) -> frozenset[str]:
    """The fields that are true or false."""
    return frozenset(found.name for found in msgspec.structs.fields(kind) if found.type is bool)


def _clipped(text: str) -> str:
    """msgspec's own words, which quote whatever came and end with where it stands."""
    escaped = ascii(text)[1:-1]
    return escaped if len(escaped) <= 2 * CLIP else f"{escaped[:CLIP]}...{escaped[-CLIP:]}"


def _json(value: object) -> str:
    return msgspec.json.encode(value).decode()
