"""The options of `tune` that set a training's hyperparameters, generated from the recipe's fields.

Every field with a description is an option, with that help. Values go to the server as numbers, lists and
texts; only the server validates them.
"""

import inspect
import json
import math
from typing import Annotated, Any, get_args, get_origin

import msgspec
import typer

from server.finetune.recipe import OPENAI_FIELDS, Training
from server.finetune.recipe_fields import plain_type
from server.finetune.recipe_methods import PEFT

METHODS_HELP = f"{', '.join([*PEFT][:-1])} or {[*PEFT][-1]}."
COMMON = ("n_epochs", "batch_size", "learning_rate", "publish")  # shown first
FLAGS = {"n_epochs": "--epochs"}


def training_parameters() -> list[inspect.Parameter]:
    """An option for each field of a recipe, in a help panel for each method."""
    fields = {field.name: field for field in msgspec.structs.fields(Training) if _help(field)}
    common = [_parameter(fields[name], None) for name in COMMON]
    rest = [name for name in fields if name not in COMMON]
    return [
        *common,
        *(_parameter(field, f"Only for {methods}") for field, methods in _of_methods()),
        *(_parameter(fields[name], "Training, in detail") for name in rest),
    ]


def recipe_blocks(method: str, options: dict[str, Any]) -> dict[str, Any]:
    """The blocks `peft` and `hyperparameters` of a job's body, from the options that are set."""
    types = {field.name: field.type for field in msgspec.structs.fields(Training)}
    types |= {field.name: field.type for field, _ in _of_methods()}
    values = {
        name: _value(types[name], value) for name, value in options.items() if value not in (None, False)
    }
    peft = {"type": method} | {name: value for name, value in values.items() if name not in OPENAI_FIELDS}
    return {"peft": peft, "hyperparameters": {name: values[name] for name in OPENAI_FIELDS if name in values}}


def _of_methods() -> list[tuple[msgspec.structs.FieldInfo, str]]:
    """Every field of the methods' recipes, and the names of the methods that have it."""
    fields: dict[str, msgspec.structs.FieldInfo] = {}
    owners: dict[str, list[str]] = {}
    for method, recipe in PEFT.items():
        for field in msgspec.structs.fields(recipe):
            fields[field.name] = field
            owners.setdefault(field.name, []).append(method)
    return [(field, " and ".join(owners[name])) for name, field in fields.items()]


def _parameter(field: msgspec.structs.FieldInfo, panel: str | None) -> inspect.Parameter:
    kind = bool if _plain(field.type) is bool else str
    known = kind is str and field.default not in (msgspec.NODEFAULT, "", ())
    option = typer.Option(
        FLAGS.get(field.name, "--" + field.name.replace("_", "-")),
        help=_help(field) + (f" Default: {field.default}." if known else ""),
        metavar=None if kind is bool else _metavar(field.type),
        show_default=False,
        rich_help_panel=panel,
    )
    return inspect.Parameter(
        field.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, option]
    )


def _help(field: msgspec.structs.FieldInfo) -> str:
    """The field's description; "" for a field that is no option."""
    metas = (meta for meta in get_args(field.type) if isinstance(meta, msgspec.Meta))
    return next((meta.description for meta in metas if meta.description), "")


def _value(kind: Any, text: str | bool) -> Any:
    """The option's text as a JSON value of this type; other text as it is, for the server to refuse."""
    plain = _plain(kind)
    if isinstance(text, bool) or plain not in (int, float, tuple):
        return text
    if plain is tuple:
        return text if text == "all-linear" else text.split(",")
    try:
        value = json.loads(text)
    except ValueError:
        return text
    finite = isinstance(value, int) or (isinstance(value, float) and math.isfinite(value))
    return value if finite else text


def _plain(kind: Any) -> Any:
    """A field's type without its bounds; `tuple` for a list."""
    return get_origin(plain_type(kind)) or plain_type(kind)


def _metavar(kind: Any) -> str:
    return {int: "N", float: "X", tuple: "A,B,..."}.get(_plain(kind), "TEXT")
