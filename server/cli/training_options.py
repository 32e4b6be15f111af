"""The options of `tune` that set a training's hyperparameters, generated from the recipe's fields.

Values go to the server as numbers, lists and texts; only the server validates them.
"""

import inspect
import json
import math
from typing import Annotated, Any, get_origin

import msgspec
import typer

from server.finetune.recipe import OPENAI_FIELDS, Training
from server.finetune.recipe_methods import PEFT

HELP = {
    "n_epochs": "How often all examples are gone through.",
    "batch_size": "Examples of one forward pass.",
    "learning_rate": "The peak.",
    "gradient_accumulation": "Forward passes of one update.",
    "weight_decay": "Of matrices.",
    "warmup_ratio": "The share of steps in which the learning rate rises.",
    "scheduler": "How it falls then: linear, cosine or constant.",
    "early_stopping": "Stop after so many evaluations without a better one; 0: never.",
    "max_tokens": "Of an example; longer ones lose their beginning.",
    "eval_share": "Of the data, held out where there is no --validation.",
    "publish": "Whether `latest` moves to the new version: if_better than the base, always or never.",
    "max_seconds": "Training time; then the best adapter so far is taken.",
    "r": "Rank.",
    "lora_alpha": "What is added is scaled by lora_alpha / r.",
    "lora_dropout": "On the input.",
    "target_modules": "Linear layers by their last names, with commas between; else all.",
    "use_rslora": "Scale by lora_alpha / sqrt(r).",
    "use_dora": "Train magnitudes apart from directions.",
    "reduction_factor": "The model's width over the bottleneck's.",
    "placement": "seq_bn (after MLPs), double_seq_bn (after attention too) or par_bn (beside MLPs).",
    "non_linearity": "In the bottleneck: relu, silu, gelu, ...",
    "scaling": "Of what is added; 4 for par_bn.",
    "num_virtual_tokens": "How many tokens are learnt.",
    "init_text": "What they start from; else the first example.",
    "biases": "Which are trained: all, linear or norm.",
}
NOT_OPTIONS = {"learning_rate_multiplier"}  # OpenAI's alternative to learning_rate
COMMON = ("n_epochs", "batch_size", "learning_rate", "publish")  # shown first
FLAGS = {"n_epochs": "--epochs"}


def training_parameters() -> list[inspect.Parameter]:
    """An option for each field of a recipe, in a help panel for each method."""
    fields = {field.name: field for field in msgspec.structs.fields(Training)}
    common = [_parameter(fields[name], None) for name in COMMON]
    rest = [name for name in fields if name not in {*COMMON, *NOT_OPTIONS}]
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
        help=HELP[field.name] + (f" Default: {field.default}." if known else ""),
        metavar=None if kind is bool else _metavar(field.type),
        show_default=False,
        rich_help_panel=panel,
    )
    return inspect.Parameter(
        field.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, option]
    )


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
    kind = kind.__origin__ if get_origin(kind) is Annotated else kind
    return get_origin(kind) or kind


def _metavar(kind: Any) -> str:
    return {int: "N", float: "X", tuple: "A,B,..."}.get(_plain(kind), "TEXT")
