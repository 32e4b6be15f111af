"""Several adapters in one request: sums as PEFT adds them, a LoRA behind a prefix or a prompt."""

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from server.messages import AdapterRef, Generate, Sampling, Use
from tests.fixtures.adapters import make_beft, make_ia3, make_prefix, make_prompt
from tests.fixtures.engine import Done, Stand, publish, run
from tests.fixtures.models import load_model, logits_of, make_lora

NEW = 12
TARGETS = ["q_proj", "v_proj", "down_proj"]


@pytest.fixture(scope="module")
def model(tiny_models: Callable[[str], Path]) -> Path:
    return tiny_models("llama")


@pytest.fixture(scope="module")
def s(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stand]:
    stand = Stand(model, tmp_path_factory.mktemp("stack"), 0, max_batch_tokens=32, adapter_slots=4)
    yield stand
    stand.engine.close()


@pytest.fixture(scope="module")
def folders(s: Stand) -> dict[str, Path]:
    base, root = s.base, s.folder
    return {
        "a": make_lora(base, root / "a", seed=1, r=4, target_modules=TARGETS),
        "b": make_lora(base, root / "b", seed=2, r=8, target_modules=TARGETS),
        "dora": make_lora(base, root / "dora", seed=3, r=4, use_dora=True, target_modules=TARGETS),
        "norms": make_lora(
            base, root / "norms", seed=8, r=4, target_modules=TARGETS, modules_to_save=["norm"]
        ),
        "bias": make_beft(base, root / "bias", seed=4, target_modules=["v_proj"]),
        "ia3": make_ia3(base, root / "ia3", seed=5, target_modules=["v_proj"], feedforward_modules=[]),
        "prefix": make_prefix(base, root / "prefix", 20, seed=6),
        "prompt": make_prompt(base, root / "prompt", 5, seed=7),
    }


@pytest.fixture(scope="module")
def refs(s: Stand, folders: dict[str, Path]) -> dict[str, AdapterRef]:
    return {name: publish(s.objects, s.engine.base, folder) for name, folder in folders.items()}


def ask(s: Stand, refs: dict[str, AdapterRef], *rows: dict[str, float]) -> list[Done]:
    """One batch; each row is {adapter: weight}."""
    sampling = Sampling(max_tokens=NEW, temperature=0.0, ignore_eos=True)
    commands = [
        Generate(
            f"row {i}",
            "tenant",
            s.prompt(i, 40),
            sampling,
            adapters=tuple(Use(refs[n], w) for n, w in row.items()),
        )
        for i, row in enumerate(rows)
    ]
    return run(s.engine, commands)


def greedy(model: Any, prompt: list[int], tokens: list[int]) -> list[int]:
    with torch.inference_mode():
        return logits_of(model, prompt, tokens).argmax(-1).tolist()


def peft_sum(model_dir: Path, folders: dict[str, Path], weights: dict[str, float]) -> Any:
    """PEFT's own weighted adapter: combination "cat" is the exact sum."""
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        names = list(weights)
        model = PeftModel.from_pretrained(load_model(model_dir), folders[names[0]], adapter_name=names[0])
        for name in names[1:]:
            model.load_adapter(folders[name], adapter_name=name)
        model.add_weighted_adapter(names, list(weights.values()), "sum", combination_type="cat")
        model.set_adapter("sum")
    return model.eval()


def test_a_weighted_sum_is_pefts(
    s: Stand, model: Path, folders: dict[str, Path], refs: dict[str, AdapterRef]
) -> None:
    rows = [{"a": 0.7, "b": 0.4}, {"a": 1.0, "b": 1.0}, {"b": 0.5}]
    found = ask(s, refs, *rows)
    for i, (weights, done) in enumerate(zip(rows, found, strict=True)):
        assert done.error is None
        assert done.tokens == greedy(peft_sum(model, folders, weights), s.prompt(i, 40), done.tokens), weights
    assert len({tuple(done.tokens) for done in found}) == 3


@pytest.mark.parametrize("first", ["prefix", "prompt"])
def test_a_lora_stands_behind_virtual_tokens(
    s: Stand, model: Path, folders: dict[str, Path], refs: dict[str, AdapterRef], first: str
) -> None:
    from peft import PeftModel

    found = ask(s, refs, {first: 1.0, "a": 0.8}, {"a": 0.8, first: 1.0}, {first: 1.0})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        merged = peft_sum(model, folders, {"a": 0.8}).merge_and_unload()
        oracle = PeftModel.from_pretrained(merged, folders[first]).eval()
        for i in (0, 1):
            assert found[i].tokens == greedy(oracle, s.prompt(i, 40), found[i].tokens)
    assert found[2].error is None


def test_lora_and_biases_add_up(s: Stand, refs: dict[str, AdapterRef]) -> None:
    both, lora, bias = ask(s, refs, {"a": 1.0, "bias": 1.0}, {"a": 1.0}, {"bias": 1.0})
    zero = ask(s, refs, {"a": 1.0, "bias": 0.0})[0]
    again = run(
        s.engine, [Generate("x", "tenant", s.prompt(0, 40), Sampling(NEW, 0.0, ignore_eos=True), refs["a"])]
    )[0]
    assert both.error is lora.error is bias.error is None
    assert zero.tokens == again.tokens
    assert both.tokens != again.tokens


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ({"prefix": 1.0, "prompt": 1.0}, "both put virtual tokens first"),
        ({"prefix": 0.5, "a": 1.0}, "no weight but 1"),
        ({"dora": 0.5}, "cannot be weighted"),
        ({"dora": 1.0, "a": 1.0}, "cannot be weighted"),
        ({"norms": 0.5}, "cannot be weighted"),
        ({"norms": 1.0, "a": 1.0}, "cannot be weighted"),
        ({"ia3": 1.0, "a": 1.0}, "cannot be weighted"),
        ({"a": 1.0, "b": 1.0, "bias": 1.0, "prefix": 1.0, "prompt": 1.0}, "the device has 4 slots"),
    ],
)
def test_what_has_no_meaning_is_refused_alone(
    s: Stand, refs: dict[str, AdapterRef], row: dict[str, float], sentence: str
) -> None:
    refused, other = ask(s, refs, row, {"a": 1.0})
    assert refused.error is not None
    assert refused.error[0] == "invalid_value"
    assert sentence in refused.error[1]
    assert other.error is None
    assert all(resident.references == 0 for resident in s.engine.cache.by_digest.values())


def test_one_adapter_with_gains_may_stand_alone_or_behind_a_prefix(
    s: Stand, refs: dict[str, AdapterRef]
) -> None:
    assert [done.error for done in ask(s, refs, {"dora": 1.0}, {"prefix": 1.0, "ia3": 1.0})] == [None, None]
    assert [done.error for done in ask(s, refs, {"norms": 1.0}, {"prompt": 1.0, "norms": 1.0})] == [
        None,
        None,
    ]
