"""Turns Settings into command-line options, generated from the class, and options into Settings."""

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
    """A signature from which typer makes an option for each of these settings."""
    return inspect.Signature([_parameter(name, Settings.model_fields[name]) for name in names])


def read_settings(options: dict[str, Any]) -> Settings:
    """The settings: options override the environment, which overrides defaults. Raises StartupError."""
    try:
        return Settings(**{name: value for name, value in options.items() if value is not None})
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0])
        raise StartupError(f"{_flag(name)} {shown(first['input'])}: {first['msg']}.", param=name) from None


def _parameter(name: str, field: FieldInfo) -> inspect.Parameter:
    """The option of one setting. Its type is text: Settings alone parses and checks values."""
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
    """`a|b` for a choice, otherwise the type's name, without "or None"."""
    if get_origin(annotation) is types.UnionType:
        annotation = get_args(annotation)[0]
    choices = get_args(annotation)
    return "|".join(map(str, choices)) if choices else annotation.__name__.upper()
