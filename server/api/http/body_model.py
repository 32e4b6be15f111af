"""What the JSON bodies of all routes have in common: the strict base model and its checks of size.

No "5" for 5, no unknown field; a null counts as absent. The operator's caps come with the validation
context, a Settings (see json_body.py).
"""

from collections.abc import Callable
from functools import cache
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, model_validator

from server.errors import InvalidField, shown
from server.settings import Settings

MAX_METADATA = 16
LAST_SECOND = 253_402_300_799  # Unix seconds: of the year 9999


def caps(info: ValidationInfo) -> Settings:
    """The settings that hold the operator's caps."""
    if not isinstance(info.context, Settings):
        raise TypeError("these bodies are validated with a Settings as their context")
    return info.context


def at_most(what: str, value: int, limit: int, param: str | None = None) -> None:
    """Raise InvalidField if `value` is over `limit`."""
    if value > limit:
        raise InvalidField(f"{what} must be at most {limit}, not {shown(value)}.", param=param or what)


def at_most_entries(limit: int) -> Callable[[Any, ValidationInfo], Any]:
    """A validator that counts a list or an object before its entries are looked at."""

    def check(value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, list | dict):
            field = info.field_name or "body"
            at_most(f"the number of entries of {field}", len(value), limit, field)
        return value

    return check


class Body(BaseModel):
    """An object of a request. `refused` names known fields that this server does not support, and why."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)
    refused: ClassVar[dict[str, str]] = {}

    @model_validator(mode="before")
    @classmethod
    def _known_fields(cls, data: Any) -> Any:
        """Stop at the first unknown name; pydantic would list a million of them."""
        if not isinstance(data, dict):
            return data
        present = {name: value for name, value in data.items() if value is not None}
        for name in present:
            if name in cls.refused:
                raise InvalidField(f"{name} is not supported: {cls.refused[name]}.", param=name)
            if name not in cls._names():
                field = shown(name)
                raise InvalidField(
                    f"{field} is not a field of this request.", param=field[1:-1], code="unknown_field"
                )
        return present

    @classmethod
    @cache
    def _names(cls) -> frozenset[str]:
        return frozenset(field.alias or name for name, field in cls.model_fields.items())


MetadataKey = Annotated[str, Field(min_length=1, max_length=64)]
MetadataValue = Annotated[str, Field(max_length=512)]
Metadata = Annotated[dict[MetadataKey, MetadataValue], BeforeValidator(at_most_entries(MAX_METADATA))]
