"""The fields of a request, each with its path in the JSON body, for error messages. No torch."""

import math
from collections.abc import Collection
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import msgspec

from server.errors import InvalidField, shown


class RequestFields:
    """Values and paths by field name. A field that is null or "auto" counts as absent."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}
        self.paths: dict[str, str] = {}

    def add(self, path: str, block: object, known: Collection[str]) -> None:
        """Add the fields of the object `block`, which is at `path`.

        Raises InvalidField for a name that is not in `known` and for a field that is given twice.
        """
        for name, value in present(path, block).items():
            field_path = f"{path}.{name}" if name in known else path
            if name not in known:
                raise InvalidField(
                    f"{shown(name)} is not a field of {path}.", param=field_path, code="unknown_field"
                )
            if name in self.paths:
                raise InvalidField(
                    f"{field_path} is given twice; it also stands at {self.paths[name]}.", param=field_path
                )
            self.values[name], self.paths[name] = value, field_path

    def fields(self, kind: type[msgspec.Struct]) -> dict[str, Any]:
        """The fields that the struct `kind` has, converted to their types. Raises InvalidField."""
        hints = get_type_hints(kind, include_extras=True)
        return {
            name: self._typed(name, hints[name]) for name in kind.__struct_fields__ if name in self.values
        }

    def invalid(self, name: str, rule: str, value: object = None) -> InvalidField:
        """An error for a field; `value` is its default, if the field was not given."""
        path = self.paths.get(name, name)
        return InvalidField(f"{path} is {shown(self.values.get(name, value))}; {rule}.", param=path)

    def _typed(self, name: str, kind: Any) -> Any:
        value = self.values[name]
        if isinstance(value, float) and not math.isfinite(value):
            raise self.invalid(name, "it must be a finite number")
        try:
            return msgspec.convert(value, kind)
        except msgspec.ValidationError as error:
            reason = str(error).replace("`", "")
            if reason.startswith("Invalid enum value"):
                reason = "Expected one of " + ", ".join(get_args(plain_type(kind)))
            raise self.invalid(name, reason[0].lower() + reason[1:]) from error


def present(path: str, block: object) -> dict[str, Any]:
    """The fields of the object at `path` that are neither null nor "auto".

    Raises InvalidField if `block` is no object.
    """
    if block is None:
        return {}
    if not isinstance(block, dict):
        raise InvalidField(f"{path} is {shown(block)}; it must be an object.", param=path)
    return {name: value for name, value in block.items() if value is not None and value != "auto"}


def plain_type(kind: Any) -> Any:
    """A field's type without its bounds and description."""
    return kind.__origin__ if get_origin(kind) is Annotated else kind
