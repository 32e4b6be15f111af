"""A training's recipe: all of its settings, complete and checked. No torch.

`parse_recipe` builds a Recipe from a request: OpenAI's hyperparameters, and our `peft` block with the
settings of the method and all other settings of training. Unset fields get defaults for the method and the
number of examples, so `recipe_object` reports what training will really use.

A setting of every method is a field of Training; its description is the help of its option of `polypeft
tune`. A setting of one method is a field of that method's struct in recipe_methods.py.
"""

import math
import secrets
from typing import Annotated, Any, Literal, get_args

import msgspec
from msgspec import Meta

from server.adapters.sites import Base
from server.errors import InvalidField, shown
from server.finetune.recipe_fields import RequestFields, present
from server.finetune.recipe_methods import PEFT, Peft

MAX_SEED = 2**31 - 1
MAX_LEARNING_RATE = 10.0

ObjectiveName = Literal["supervised"]  # method.type; training/objective.py implements each


class Training(msgspec.Struct, frozen=True, kw_only=True):
    """The settings of every method.

    `learning_rate` is the peak: our default times the multiplier, or as given.
    """

    n_epochs: Annotated[int, Meta(ge=1, le=50, description="How often all examples are gone through.")]
    batch_size: Annotated[int, Meta(ge=1, le=256, description="Examples of one forward pass.")]
    gradient_accumulation: Annotated[int, Meta(ge=1, le=64, description="Forward passes of one update.")] = 1
    learning_rate_multiplier: Annotated[float, Meta(gt=0, le=1000)] = 1.0  # OpenAI's; no option of `tune`
    learning_rate: Annotated[float, Meta(gt=0, le=MAX_LEARNING_RATE, description="The peak.")]
    weight_decay: Annotated[float, Meta(ge=0, le=1, description="Of matrices.")] = 0.0
    warmup_ratio: Annotated[
        float, Meta(ge=0, le=0.5, description="The share of steps in which the learning rate rises.")
    ] = 0.05
    scheduler: Annotated[
        Literal["linear", "cosine", "constant"],
        Meta(description="How it falls then: linear, cosine or constant."),
    ] = "linear"
    early_stopping: Annotated[
        int,
        Meta(ge=0, le=100, description="Stop after so many evaluations without a better one; 0: never."),
    ] = 3
    max_tokens: Annotated[int, Meta(ge=2, description="Of an example; longer ones lose their beginning.")]
    eval_share: Annotated[
        float, Meta(ge=0, le=0.5, description="Of the data, held out where there is no --validation.")
    ] = 0.1
    publish: Annotated[
        Literal["if_better", "always", "never"],
        Meta(
            description="Whether `latest` moves to the new version: if_better than the base, always or never."
        ),
    ] = "if_better"
    max_seconds: Annotated[
        int, Meta(ge=1, description="Training time; then the best adapter so far is taken.")
    ]


class Recipe(Training, frozen=True, kw_only=True):
    """All settings of one training. It is stored with its job."""

    objective: ObjectiveName = "supervised"
    peft: Peft
    seed: Annotated[int, Meta(ge=0, le=MAX_SEED)]

    @property
    def num_virtual_tokens(self) -> int:
        """The number of virtual tokens before each example."""
        count: int = getattr(self.peft, "num_virtual_tokens", 0)
        return count

    def steps(self, examples: int) -> int:
        """The number of updates for so many training examples, as transformers.Trainer counts them."""
        batches = -(-examples // self.batch_size)
        return self.n_epochs * -(-batches // self.gradient_accumulation)


class RecipeLimits(msgspec.Struct, frozen=True, kw_only=True):
    """The server's limits for a job; the types of the fields have bounds of their own."""

    lora_rank: int = 256
    steps: int = 100_000
    max_tokens: int = 4096
    seconds: int = 6 * 3600


# OpenAI's hyperparameters; the other fields are ours, in `peft`
OPENAI_FIELDS = ("n_epochs", "batch_size", "learning_rate_multiplier")


def recipe_object(recipe: Recipe) -> dict[str, Any]:
    """The recipe in a job object: OpenAI's `hyperparameters` and `method`, with our `peft` in the latter."""
    fields = msgspec.to_builtins(recipe)
    hyperparameters = {name: fields.pop(name) for name in OPENAI_FIELDS}
    method = fields.pop("peft")
    seed, objective = fields.pop("seed"), fields.pop("objective")
    peft = method | fields
    settings = {"type": objective, objective: {"hyperparameters": hyperparameters}, "peft": peft}
    return {"hyperparameters": hyperparameters, "method": settings, "seed": seed}


def parse_recipe(
    method: dict[str, Any] | None,
    hyperparameters: dict[str, Any] | None,
    seed: int | None,
    base: Base,
    examples: int,
    *,
    peft: dict[str, Any] | None = None,
    limits: RecipeLimits = RecipeLimits(),  # noqa: B008 - frozen
) -> Recipe:
    """The recipe of a request's `method`, `hyperparameters` and `seed`, with `peft` in `method` or beside it.

    `examples` is the number of training examples. Raises InvalidField whose param is the field's path, such
    as "method.peft.r".
    """
    request = RequestFields()
    objective, kind = _collect(request, method, hyperparameters, peft)
    settings = request.fields(kind)
    peft_recipe = kind(**kind.defaults(settings, base) | settings)
    requested = request.fields(Training) | {"objective": objective}
    recipe = _complete(peft_recipe, requested, _seed(seed), base, examples, limits)
    peft_recipe.check(request, base, limits.lora_rank)
    _check_training(recipe, request, base, examples, limits)
    return recipe


def _collect(
    request: RequestFields,
    method: dict[str, Any] | None,
    hyperparameters: dict[str, Any] | None,
    peft: dict[str, Any] | None,
) -> tuple[ObjectiveName, type[Peft]]:
    """Add the fields of all blocks to `request`; the objective and the PEFT method's recipe that they name.

    Raises InvalidField for an unknown field, objective or method, and for a field that is given twice.
    """
    blocks = present("method", method)
    objective = _objective(blocks.pop("type", "supervised"))
    settings = present(f"method.{objective}", blocks.pop(objective, None))
    request.add(f"method.{objective}.hyperparameters", settings.pop("hyperparameters", None), OPENAI_FIELDS)
    request.add("hyperparameters", hyperparameters, OPENAI_FIELDS)
    request.add(f"method.{objective}", settings, ())
    path, block = "method.peft", present("method.peft", blocks.pop("peft", None))
    request.add("method", blocks, ())
    if peft is not None:
        if block:
            raise InvalidField("peft is given twice; it also stands at method.peft.", param="peft")
        path, block = "peft", present("peft", peft)
    name = block.setdefault("type", "lora")
    if not isinstance(name, str) or name not in PEFT:
        rule = f"it must be {' or '.join(PEFT)}"
        raise InvalidField(f"{path}.type is {shown(name)}; {rule}.", param=f"{path}.type")
    if block.get("target_modules") == "all-linear":  # PEFT's name for our default
        del block["target_modules"]
    kind = PEFT[name]
    known = {*kind.__struct_fields__, *Training.__struct_fields__, "type"} - {*OPENAI_FIELDS}
    request.add(path, block, known)
    return objective, kind


def _objective(named: object) -> ObjectiveName:
    known: tuple[ObjectiveName, ...] = get_args(ObjectiveName)
    for name in known:
        if named == name:
            return name
    rule = f"it must be {' or '.join(known)}"
    raise InvalidField(f"method.type is {shown(named)}; {rule}.", param="method.type")


def _complete(
    peft: Peft, requested: dict[str, Any], seed: int, base: Base, examples: int, limits: RecipeLimits
) -> Recipe:
    """Fill the fields that were not given with defaults for this method and number of examples."""
    batch_size = requested.get("batch_size") or (2 if examples < 32 else 4 if examples < 256 else 8)
    epoch_updates = max(1, examples // batch_size)
    min_epochs = 3 if examples < 1000 else 1
    virtual = getattr(peft, "num_virtual_tokens", 0)
    defaults: dict[str, Any] = {
        "n_epochs": min(max(min_epochs, round(peft.default_updates / epoch_updates)), 20),
        "batch_size": batch_size,
        "max_tokens": max(2, min(1024, limits.max_tokens, base.max_context - virtual)),
        "max_seconds": limits.seconds,
        "learning_rate": peft.default_learning_rate * requested.get("learning_rate_multiplier", 1.0),
    }
    return Recipe(peft=peft, seed=seed, **(defaults | requested))


def _seed(seed: int | None) -> int:
    if seed is None:
        return secrets.randbelow(MAX_SEED + 1)
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed <= MAX_SEED:
        raise InvalidField(f"seed is {shown(seed)}; it must be 0 to {MAX_SEED}.", param="seed")
    return seed


def _check_training(
    recipe: Recipe, request: RequestFields, base: Base, examples: int, limits: RecipeLimits
) -> None:
    max_tokens = min(limits.max_tokens, base.max_context - recipe.num_virtual_tokens)
    if max_tokens < 2:
        rule = f"a context of {base.max_context} leaves no room for examples"
        raise request.invalid("num_virtual_tokens", rule, recipe.num_virtual_tokens)
    if recipe.max_tokens > max_tokens:
        raise request.invalid("max_tokens", f"it may be {max_tokens} at most here")
    if recipe.max_seconds > limits.seconds:
        raise request.invalid("max_seconds", f"it may be {limits.seconds} at most")
    _check_rate(recipe, request)
    if (steps := recipe.steps(examples)) > limits.steps:
        rule = f"over {examples} examples that is {steps} steps, and a job may have {limits.steps}"
        raise request.invalid("n_epochs", rule, recipe.n_epochs)


def _check_rate(recipe: Recipe, request: RequestFields) -> None:
    multiplier = recipe.learning_rate_multiplier
    if recipe.learning_rate > MAX_LEARNING_RATE:
        rule = f"with it the learning rate would be {recipe.learning_rate:g}, over {MAX_LEARNING_RATE:g}"
        raise request.invalid("learning_rate_multiplier", rule)
    scaled = recipe.peft.default_learning_rate * multiplier
    if multiplier != 1 and not math.isclose(recipe.learning_rate, scaled):
        rule = "it scales our own learning rate, and learning_rate says another"
        raise request.invalid("learning_rate_multiplier", rule)
