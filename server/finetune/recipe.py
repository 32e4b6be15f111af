"""What to train and how: one job's settings, complete and checked. No torch.

`parse_recipe` makes a Recipe of what a caller sent: OpenAI's hyperparameters and our `peft` block, in which
stand the method's own knobs and all else that training takes. What is unset gets a good default for the
method and the number of examples, so that `recipe_object` reports what will really be done.
"""

import math
import secrets
from typing import Annotated, Any, Literal

import msgspec

from server.adapters.sites import Base, Site
from server.errors import InvalidField, shown
from server.finetune.recipe_fields import RequestFields, present
from server.finetune.recipe_methods import (
    PEFT,
    BitfitRecipe,
    BottleneckRecipe,
    LoraRecipe,
    Peft,
    PrefixRecipe,
    PromptRecipe,
)

MAX_SEED = 2**31 - 1
MAX_LEARNING_RATE = 10.0

Share = Annotated[float, msgspec.Meta(ge=0, le=0.5)]


class Training(msgspec.Struct, frozen=True, kw_only=True):
    """What every method is trained with. `learning_rate` is the peak: our default times the multiplier, or
    what was given.
    """

    n_epochs: Annotated[int, msgspec.Meta(ge=1, le=50)]
    batch_size: Annotated[int, msgspec.Meta(ge=1, le=256)]  # examples of one forward pass
    gradient_accumulation: Annotated[int, msgspec.Meta(ge=1, le=64)] = 1  # forward passes of one update
    learning_rate_multiplier: Annotated[float, msgspec.Meta(gt=0, le=1000)] = 1.0
    learning_rate: Annotated[float, msgspec.Meta(gt=0, le=MAX_LEARNING_RATE)]
    weight_decay: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.0
    warmup_ratio: Share = 0.05
    scheduler: Literal["linear", "cosine", "constant"] = "linear"
    early_stopping: Annotated[int, msgspec.Meta(ge=0, le=100)] = 3  # evaluations without a better one; 0: off
    max_tokens: Annotated[int, msgspec.Meta(ge=2)]  # of an example; longer ones lose their beginning
    eval_share: Share = 0.1  # held out where there is no validation file
    publish: Literal["if_better", "always", "never"] = "if_better"
    max_seconds: Annotated[int, msgspec.Meta(ge=1)]


class Recipe(Training, frozen=True, kw_only=True):
    peft: Peft
    seed: Annotated[int, msgspec.Meta(ge=0, le=MAX_SEED)]

    @property
    def num_virtual_tokens(self) -> int:
        """Virtual tokens before each example."""
        return self.peft.num_virtual_tokens if isinstance(self.peft, PrefixRecipe | PromptRecipe) else 0

    def steps(self, examples: int) -> int:
        """Updates of a whole run over so many training examples, as transformers.Trainer counts them."""
        batches = -(-examples // self.batch_size)
        return self.n_epochs * -(-batches // self.gradient_accumulation)


class RecipeLimits(msgspec.Struct, frozen=True, kw_only=True):
    """What a job may ask for, beside what the fields' own bounds say."""

    lora_rank: int = 256
    steps: int = 100_000
    max_tokens: int = 4096
    seconds: int = 6 * 3600


# peak learning rate, and about how many updates make a good adapter of little data
DEFAULTS: dict[type[Peft], tuple[float, int]] = {
    LoraRecipe: (5e-4, 150),
    BottleneckRecipe: (1e-3, 200),
    PrefixRecipe: (5e-3, 300),
    PromptRecipe: (1e-2, 300),
    BitfitRecipe: (3e-3, 200),
}
# As AdapterHub has them; par_bn there has a reduction factor of 2.
PLACEMENTS: dict[str, dict[str, Any]] = {
    "seq_bn": {},
    "double_seq_bn": {"non_linearity": "silu"},
    "par_bn": {"scaling": 4.0},
}
OPENAI_FIELDS = (
    "n_epochs",
    "batch_size",
    "learning_rate_multiplier",
)  # the rest is ours, and stands in `peft`


def recipe_object(recipe: Recipe) -> dict[str, Any]:
    """What a job object reports: OpenAI's `hyperparameters` and `method`, and in that our `peft`."""
    every = msgspec.to_builtins(recipe)
    hyperparameters = {name: every.pop(name) for name in OPENAI_FIELDS}
    method = every.pop("peft")
    seed = every.pop("seed")
    peft = method | every
    supervised = {"type": "supervised", "supervised": {"hyperparameters": hyperparameters}, "peft": peft}
    return {"hyperparameters": hyperparameters, "method": supervised, "seed": seed}


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
    """A job's `method`, `hyperparameters`, `seed`, and a `peft` block at the top level, as one Recipe.

    Raises InvalidField whose param is the field's path, e.g. "method.peft.r".
    """
    asked = RequestFields()
    kind = _take(asked, method, hyperparameters, peft)
    given = asked.fields(kind)
    if kind is LoraRecipe:
        given = {"target_modules": inner_linears(base)} | given
    elif kind is BottleneckRecipe:
        given = PLACEMENTS[given.get("placement", "seq_bn")] | given
    own = kind(**given)
    recipe = _complete(own, asked.fields(Training), _seed(seed), base, examples, limits)
    _check_method(own, asked, base, limits)
    _check_training(recipe, asked, base, examples, limits)
    return recipe


def inner_linears(base: Base) -> tuple[str, ...]:
    """The last names of all linears inside the layers: never the head."""
    return tuple(dict.fromkeys(site.name.rpartition(".")[2] for site in layer_linears(base)))


def layer_linears(base: Base) -> list[Site]:
    numbered = (site for site in base.sites.values() if site.kind == "linear")
    return [site for site in numbered if any(part.isdecimal() for part in site.name.split("."))]


def _take(
    asked: RequestFields,
    method: dict[str, Any] | None,
    hyperparameters: dict[str, Any] | None,
    peft: dict[str, Any] | None,
) -> type[Peft]:
    """Everything a caller gave, and which method that is."""
    blocks = present("method", method)
    if (named := blocks.pop("type", "supervised")) != "supervised":
        raise InvalidField(f"method.type is {shown(named)}; it must be supervised.", param="method.type")
    supervised = present("method.supervised", blocks.pop("supervised", None))
    asked.take("method.supervised.hyperparameters", supervised.pop("hyperparameters", None), OPENAI_FIELDS)
    asked.take("hyperparameters", hyperparameters, OPENAI_FIELDS)
    asked.take("method.supervised", supervised, ())
    path, block = "method.peft", present("method.peft", blocks.pop("peft", None))
    asked.take("method", blocks, ())
    if peft is not None:
        if block:
            raise InvalidField("peft is given twice; it also stands at method.peft.", param="peft")
        path, block = "peft", present("peft", peft)
    name = block.setdefault("type", "lora")
    if not isinstance(name, str) or name not in PEFT:
        rule = f"it must be {' or '.join(PEFT)}"
        raise InvalidField(f"{path}.type is {shown(name)}; {rule}.", param=f"{path}.type")
    if block.get("target_modules") == "all-linear":  # PEFT's word for our default
        del block["target_modules"]
    kind = PEFT[name]
    ours = {*kind.__struct_fields__, *Training.__struct_fields__, "type"} - {*OPENAI_FIELDS}
    asked.take(path, block, ours)
    return kind


def _complete(
    own: Peft, given: dict[str, Any], seed: int, base: Base, examples: int, limits: RecipeLimits
) -> Recipe:
    """Every field that was not given gets its default for this method and so many examples."""
    rate, updates = DEFAULTS[type(own)]
    batch = given.get("batch_size") or (2 if examples < 32 else 4 if examples < 256 else 8)
    an_epoch = max(1, examples // batch)
    least = 3 if examples < 1000 else 1
    virtual = getattr(own, "num_virtual_tokens", 0)
    defaults: dict[str, Any] = {
        "n_epochs": min(max(least, round(updates / an_epoch)), 20),
        "batch_size": batch,
        "max_tokens": max(2, min(1024, limits.max_tokens, base.max_context - virtual)),
        "max_seconds": limits.seconds,
        "learning_rate": rate * given.get("learning_rate_multiplier", 1.0),
    }
    return Recipe(peft=own, seed=seed, **(defaults | given))


def _seed(seed: int | None) -> int:
    if seed is None:
        return secrets.randbelow(MAX_SEED + 1)
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed <= MAX_SEED:
        raise InvalidField(f"seed is {shown(seed)}; it must be 0 to {MAX_SEED}.", param="seed")
    return seed


def _check_method(own: Peft, asked: RequestFields, base: Base, limits: RecipeLimits) -> None:
    """What a method's fields can only be told wrong by the base or by this server's limits."""
    if isinstance(own, LoraRecipe):
        if own.r > limits.lora_rank:
            raise asked.invalid("r", f"it may be {limits.lora_rank} at most")
        names = [f".{site.name}" for site in layer_linears(base)]
        for module in own.target_modules:
            if not any(name.endswith(f".{module}") for name in names):
                known = ", ".join(inner_linears(base))
                rule = f"{shown(module)} is no linear layer of the base's blocks, which are {known}"
                raise asked.invalid("target_modules", rule)
    no_blocks = not any(site.kind == "mlp" for site in base.sites.values())
    if isinstance(own, BottleneckRecipe) and no_blocks:
        raise asked.invalid("type", f"bottleneck adapters cannot be trained on a {base.model_type}")


def _check_training(
    recipe: Recipe, asked: RequestFields, base: Base, examples: int, limits: RecipeLimits
) -> None:
    most = min(limits.max_tokens, base.max_context - recipe.num_virtual_tokens)
    if most < 2:
        rule = f"a context of {base.max_context} leaves no room for examples"
        raise asked.invalid("num_virtual_tokens", rule, recipe.num_virtual_tokens)
    if recipe.max_tokens > most:
        raise asked.invalid("max_tokens", f"it may be {most} at most here")
    if recipe.max_seconds > limits.seconds:
        raise asked.invalid("max_seconds", f"it may be {limits.seconds} at most")
    _check_rate(recipe, asked)
    if (steps := recipe.steps(examples)) > limits.steps:
        rule = f"over {examples} examples that is {steps} steps, and a job may have {limits.steps}"
        raise asked.invalid("n_epochs", rule, recipe.n_epochs)


def _check_rate(recipe: Recipe, asked: RequestFields) -> None:
    multiplier = recipe.learning_rate_multiplier
    if recipe.learning_rate > MAX_LEARNING_RATE:
        rule = f"with it the learning rate would be {recipe.learning_rate:g}, over {MAX_LEARNING_RATE:g}"
        raise asked.invalid("learning_rate_multiplier", rule)
    usual = DEFAULTS[type(recipe.peft)][0] * multiplier
    if multiplier != 1 and not math.isclose(recipe.learning_rate, usual):
        rule = "it scales our own learning rate, and learning_rate says another"
        raise asked.invalid("learning_rate_multiplier", rule)
