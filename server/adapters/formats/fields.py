"""A tenant's config as a closed list of fields. Nothing of it is run, imported or fetched.

A field is kept because it changes what the adapter computes, is dropped because it cannot, or must hold
its default because what it asks for is not served. A field that is in no list is refused: silence would
change outputs.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

import msgspec

from server.adapters.formats.strict import check_inert
from server.errors import InvalidAdapter, shown

FILE = "adapter_config.json"
CLIP = 100  # characters of each end of a long explanation

ModuleName = Annotated[str, msgspec.Meta(pattern=r"\A[A-Za-z0-9_.-]{1,256}\Z")]
Modules = Annotated[tuple[ModuleName, ...], msgspec.Meta(max_length=10_000)]


@dataclass(frozen=True)
class Fields:
    """Every field that one type of adapter may have."""

    kept: type[msgspec.Struct]  # frozen, forbids unknown fields
    dropped: frozenset[str] = frozenset()  # says how the adapter was made, or where from
    empty: frozenset[str] = frozenset()  # asks for what is not served
    one_of: Mapping[str, tuple[object, ...]] = field(default_factory=dict)
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
        try:
            return msgspec.convert(kept, self.kept)
        except msgspec.ValidationError as error:
            raise InvalidAdapter(f"{FILE}: {_clipped(str(error))}.", param="adapter_config") from error

    def _is_kept(self, name: str, value: Any) -> bool:
        """False for a field to drop; raises for one that must not be there, or not so."""
        if name in self.one_of:
            allowed = self.one_of[name]
            if not any(type(value) is type(one) and value == one for one in allowed):
                raise refused(name, value, f"it must be {' or '.join(map(_json, allowed))}")
        if name in self.kept.__struct_fields__:
            return True
        if name in self.dropped:
            check_inert(FILE, name, value)
        elif name in self.empty:
            if value not in (None, False, {}, []):
                raise refused(name, value, "it is not served and must be null")
        elif name not in self.one_of:
            raise InvalidAdapter(f"{FILE} has a field {shown(name)} that is not known.", param=FILE)
        return False


def refused(name: str, value: object, rule: str) -> InvalidAdapter:
    return InvalidAdapter(f"{FILE} has {name} {shown(value)}; {rule}.", param=name)


def _modules(name: str, value: Any) -> list[str] | None:
    """PEFT takes a string for a regular expression, except this one, and a list in no order for a set."""
    if value is None or value == "all-linear":
        return None
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise refused(name, value, "it must be a list of module names, not a pattern")
    return sorted(set(value))


def _clipped(text: str) -> str:
    """msgspec's own words, which quote whatever came and end with where it stands."""
    escaped = ascii(text)[1:-1]
    return escaped if len(escaped) <= 2 * CLIP else f"{escaped[:CLIP]}...{escaped[-CLIP:]}"


def _json(value: object) -> str:
    return msgspec.json.encode(value).decode()
