"""What a caller may ask of a training, what gets a default, and in which words the rest is refused."""

from typing import Any

import msgspec
import pytest

from server.adapters.sites import Base, Site
from server.errors import InvalidField
from server.finetune.recipe import MAX_SEED, Recipe, RecipeLimits, parse_recipe, recipe_object
from server.finetune.recipe_methods import PEFT, BottleneckRecipe, LoraRecipe, PrefixRecipe

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
CONTEXT = 512


def small_base(**changes: Any) -> Base:
    sites = [
        Site(f"model.layers.{layer}.self_attn.{leaf}", "linear", 8, 8, False)
        for layer in range(2)
        for leaf in LINEARS
    ]
    sites += [Site(f"model.layers.{layer}.mlp", "mlp", 8, 8, False) for layer in range(2)]
    sites += [Site("lm_head", "linear", 8, 30, False), Site("model.embed_tokens", "embedding", 30, 8, False)]
    fields = {"sites": {site.name: site for site in sites}} | changes
    return msgspec.structs.replace(Base("base", "llama", "", 2, 8, 1, 8, 30, CONTEXT, {}), **fields)


def parse(
    peft: dict[str, Any] | None = None,
    hyperparameters: dict[str, Any] | None = None,
    *,
    examples: int = 100,
    **options: Any,
) -> Recipe:
    method = {"type": "supervised", "supervised": {"hyperparameters": hyperparameters}, "peft": peft}
    return parse_recipe(method, None, 7, small_base(), examples, **options)


def test_nothing_asked_gives_lora_on_every_linear_of_the_layers() -> None:
    recipe = parse_recipe(None, None, None, small_base(), 100)
    assert recipe.peft == LoraRecipe(target_modules=LINEARS)
    assert 0 <= recipe.seed <= MAX_SEED
    assert recipe.max_tokens == CONTEXT


@pytest.mark.parametrize("method", PEFT)
@pytest.mark.parametrize("examples", [2, 50, 500, 100_000])
def test_a_recipe_is_complete_and_survives_json_and_being_sent_again(method: str, examples: int) -> None:
    recipe = parse({"type": method}, examples=examples)
    assert msgspec.json.decode(msgspec.json.encode(recipe), type=Recipe) == recipe
    told = recipe_object(recipe)
    assert "auto" not in str(told)
    assert None not in told["method"]["peft"].values()
    again = parse_recipe(told["method"], None, told["seed"], small_base(), 3)
    assert again == recipe


def test_auto_and_null_are_absent() -> None:
    asked = {"type": "lora", "r": "auto", "lora_alpha": None, "target_modules": "all-linear"}
    assert parse(asked, {"n_epochs": "auto", "batch_size": None}) == parse()


def test_what_is_asked_is_done() -> None:
    peft = {"type": "lora", "r": 4, "target_modules": ["layers.1.self_attn.q_proj"], "weight_decay": 0.1}
    recipe = parse(peft, {"n_epochs": 3, "batch_size": 2, "learning_rate_multiplier": 0.5})
    assert (recipe.n_epochs, recipe.batch_size, recipe.weight_decay) == (3, 2, 0.1)
    assert recipe.peft == LoraRecipe(r=4, target_modules=("layers.1.self_attn.q_proj",))
    assert recipe.learning_rate == parse().learning_rate / 2
    assert recipe.steps(101) == 3 * 51


def test_openai_places_hyperparameters_in_two_ways_and_the_sdk_our_block_in_two() -> None:
    block = {"type": "prefix", "num_virtual_tokens": 3}
    there = parse(block, {"n_epochs": 4})
    here = parse_recipe(None, {"n_epochs": 4}, 7, small_base(), 100, peft=block)
    assert there == here
    assert there.peft == PrefixRecipe(num_virtual_tokens=3)
    assert there.max_tokens == CONTEXT - 3


def test_placements_bring_adapterhubs_own_defaults() -> None:
    def found(placement: str) -> BottleneckRecipe:
        peft = parse({"type": "bottleneck", "placement": placement}).peft
        assert isinstance(peft, BottleneckRecipe)
        return peft

    assert found("seq_bn").non_linearity == "relu"
    assert found("double_seq_bn").non_linearity == "silu"
    assert found("par_bn").scaling == 4


REFUSED: dict[str, list[dict[str, Any]]] = {
    "type": [{"type": "ia3"}, {"type": ["lora"]}, {"type": 3}],
    "r": [{"r": 0}, {"r": 10**9}, {"r": -1}, {"r": 1.5}, {"r": True}, {"r": "8"}, {"r": 257}],
    "lora_alpha": [{"lora_alpha": 0}, {"lora_alpha": float("nan")}, {"lora_alpha": float("inf")}],
    "lora_dropout": [{"lora_dropout": 1}, {"lora_dropout": -0.1}],
    "use_dora": [{"use_dora": 1}],
    "target_modules": [
        {"target_modules": ["lm_head"]},
        {"target_modules": ["embed_tokens"]},
        {"target_modules": ["proj"]},
        {"target_modules": []},
        {"target_modules": ".*"},
        {"target_modules": ["../../etc/passwd"]},
        {"target_modules": [3]},
        {"target_modules": ["q_proj"] * 1025},
    ],
    "reduction_factor": [{"type": "bottleneck", "reduction_factor": 0}],
    "placement": [{"type": "bottleneck", "placement": "everywhere"}],
    "non_linearity": [{"type": "bottleneck", "non_linearity": "__import__('os')"}],
    "num_virtual_tokens": [
        {"type": "prefix", "num_virtual_tokens": 0},
        {"type": "prompt", "num_virtual_tokens": 511},
        {"type": "prompt", "num_virtual_tokens": 10**6},
    ],
    "init_text": [{"type": "prompt", "init_text": "x" * 5000}, {"type": "prefix", "init_text": ["x"]}],
    "biases": [{"type": "bitfit", "biases": "some"}],
    "learning_rate": [{"learning_rate": r} for r in (0, -1, 11, float("nan"), float("inf"), "fast")],
    "weight_decay": [{"weight_decay": -1}],
    "warmup_ratio": [{"warmup_ratio": 0.9}],
    "scheduler": [{"scheduler": "cyclic"}, {"scheduler": 1}],
    "early_stopping": [{"early_stopping": -1}],
    "gradient_accumulation": [{"gradient_accumulation": 0}],
    "max_tokens": [{"max_tokens": 1}, {"max_tokens": 513}],
    "eval_share": [{"eval_share": 1}],
    "publish": [{"publish": True}],
    "max_seconds": [{"max_seconds": 0}, {"max_seconds": 10**9}],
}


@pytest.mark.parametrize(
    ("field", "peft"), [(field, one) for field, every in REFUSED.items() for one in every]
)
def test_a_bad_field_is_named(field: str, peft: dict[str, Any]) -> None:
    with pytest.raises(InvalidField) as error:
        parse({"type": "lora"} | peft)
    assert error.value.param == f"method.peft.{field}"
    assert str(error.value).startswith(f"method.peft.{field} is ")


BAD_NUMBERS = (0, -1, 10**9, 1.5, True, "3", float("nan"), [1])


@pytest.mark.parametrize("field", ["n_epochs", "batch_size", "learning_rate_multiplier"])
@pytest.mark.parametrize("value", BAD_NUMBERS)
def test_bad_hyperparameters(field: str, value: object) -> None:
    if field == "learning_rate_multiplier" and value == 1.5:
        return
    with pytest.raises(InvalidField) as error:
        parse(None, {field: value})
    assert error.value.param == f"method.supervised.hyperparameters.{field}"


@pytest.mark.parametrize(
    ("method", "param"),
    [
        ({"type": "dpo"}, "method.type"),
        ({"type": "supervised", "dpo": {}}, "method"),
        ({"supervised": {"hyperparameters": {"beta": 1}}}, "method.supervised.hyperparameters"),
        ({"supervised": {"code": "x"}}, "method.supervised"),
        ({"supervised": [1]}, "method.supervised"),
        ({"peft": "lora"}, "method.peft"),
        ({"peft": {"n_epochs": 3}}, "method.peft"),
        ({"peft": {"type": "prefix", "r": 3}}, "method.peft"),
        ({"peft": {"type": "lora", "../x": 3}}, "method.peft"),
        ([], "method"),
    ],
)
def test_bad_blocks(method: Any, param: str) -> None:
    with pytest.raises(InvalidField) as error:
        parse_recipe(method, None, 7, small_base(), 100)
    assert error.value.param == param


@pytest.mark.parametrize("seed", [-1, 1.0, True, "1", MAX_SEED + 1])
def test_bad_seeds(seed: Any) -> None:
    with pytest.raises(InvalidField) as error:
        parse_recipe(None, None, seed, small_base(), 100)
    assert error.value.param == "seed"


def test_nothing_may_be_said_twice() -> None:
    supervised = {"supervised": {"hyperparameters": {"n_epochs": 2}}}
    with pytest.raises(InvalidField, match="twice"):
        parse_recipe(supervised, {"n_epochs": 2}, 7, small_base(), 100)
    with pytest.raises(InvalidField, match="twice"):
        parse_recipe({"peft": {"r": 2}}, None, 7, small_base(), 100, peft={"r": 2})
    with pytest.raises(InvalidField, match="learning_rate says another"):
        parse({"learning_rate": 0.1}, {"learning_rate_multiplier": 2})


def test_limits_are_the_operators() -> None:
    with pytest.raises(InvalidField, match=r"n_epochs is 50; over 100 examples that is 5000 steps"):
        parse(None, {"n_epochs": 50, "batch_size": 1}, limits=RecipeLimits(steps=4999))
    with pytest.raises(InvalidField, match="r is 9; it may be 8 at most"):
        parse({"r": 9}, limits=RecipeLimits(lora_rank=8))


def test_no_bottleneck_where_none_is_served() -> None:
    base = small_base(sites={"model.layers.0.q": Site("model.layers.0.q", "linear", 8, 8, False)})
    with pytest.raises(InvalidField) as error:
        parse_recipe({"peft": {"type": "bottleneck"}}, None, 7, base, 100)
    assert error.value.param == "method.peft.type"
