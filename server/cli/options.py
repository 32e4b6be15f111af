"""Settings as options of a command, read off the class."""

import inspect
import types
from collections.abc import Iterable
from typing import Annotated, Any, get_args, get_origin

import typer
from pydantic import ValidationError
from pydantic.fields import FieldInfo
from rich.markup import escape

from server.errors import StartupError, shown
from server.settings import Settings


def signature_of(names: Iterable[str]) -> inspect.Signature:
    """What typer reads a command's options off: one for each of these settings."""
    return inspect.Signature([_parameter(name, Settings.model_fields[name]) for name in names])


def read_settings(given: dict[str, Any]) -> Settings:
    """Options over environment over defaults. Raises StartupError, naming the first option at fault."""
    try:
        return Settings(**{name: value for name, value in given.items() if value is not None})
    except ValidationError as error:
        fault = error.errors()[0]
        name = str(fault["loc"][0])
        raise StartupError(f"{_flag(name)} {shown(fault['input'])}: {fault['msg']}.", param=name) from None


def _parameter(name: str, field: FieldInfo) -> inspect.Parameter:
    """The option of one setting. Its text goes to Settings as it is: values are checked in one place."""
    flag = f"{_flag(name)}/--no-{name.replace('_', '-')}" if field.annotation is bool else _flag(name)
    kind = bool if field.annotation is bool else str
    default = "" if field.default is None else f" Default: {field.default}."
    option = typer.Option(
        flag,
        help=escape(f"{field.description}{default}"),
        metavar=None if kind is bool else _metavar(field.annotation),
        show_default=False,
    )
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, option]
    )


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _metavar(annotation: Any) -> str:
    """`a|b` for a choice, otherwise the type's name; "or None" is said by the missing default."""
    if get_origin(annotation) is types.UnionType:
        annotation = get_args(annotation)[0]
    choices = get_args(annotation)
    return "|".join(map(str, choices)) if choices else annotation.__name__.upper()
