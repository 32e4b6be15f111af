"""Prefix and prompt tuning: what PEFT saves is read; what does not fit is refused by the tensor or field."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from server.adapters.formats.peft import TYPES
from server.adapters.methods import build_methods
from server.adapters.methods.interface import Method
from server.adapters.methods.prefix import Prefix
from server.adapters.methods.prompt import Prompt
from server.adapters.sites import Base
from server.errors import InvalidAdapter
from tests.fixtures.adapters import make_prefix, make_prompt
from tests.fixtures.models import quiet
from tests.server.adapters.methods.small import HIDDEN, base_of, changed, llama, read, reshaped, started

TOKENS = 5
TENSOR = "prompt_embeddings"
WIDTH = {
    "prefix": 2 * 2 * 2 * 4,
    "prompt": HIDDEN,
    "p-tuning": HIDDEN,
}  # prefix: layers, K and V, heads, width
METHODS: dict[str, Method] = {"prefix": Prefix(), "prompt": Prompt(), "p-tuning": Prompt()}
KINDS = list(METHODS)


@pytest.fixture(scope="module")
def model() -> Any:
    return llama()


@pytest.fixture(scope="module")
def base(model: Any) -> Base:
    return base_of(model)


@pytest.fixture(scope="module")
def saved(model: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("saved")
    return {
        "prefix": make_prefix(model, root / "prefix", TOKENS),
        "prompt": make_prompt(model, root / "prompt", TOKENS),
        "p-tuning": make_prompt(model, root / "p-tuning", TOKENS, encoder="MLP"),
    }


@pytest.mark.parametrize("kind", KINDS)
def test_what_peft_saves_is_read(saved: dict[str, Path], base: Base, kind: str) -> None:
    files, method = read(saved[kind]), METHODS[kind]
    spec = method.parse(files, base)
    assert method.shapes(spec, base) == {TENSOR: (TOKENS, WIDTH[kind])}
    assert TYPES[files.config["peft_type"]][0] == method.name
    assert set(build_methods(8)) >= {method.name}
    packed = method.pack(spec, base, {TENSOR: torch.randn(TOKENS, WIDTH[kind])}, {}, torch.float32)
    assert (packed.virtual_tokens, packed.kv_precomputed) == (TOKENS, kind == "prefix")
    assert packed.nbytes == 4 * TOKENS * WIDTH[kind]
    assert not packed.summable


def test_a_projected_prefix_is_read_flat(model: Any, base: Base, tmp_path: Path) -> None:
    files = read(make_prefix(model, tmp_path / "projected", TOKENS, projection=True))
    assert Prefix().shapes(Prefix().parse(files, base), base) == {TENSOR: (TOKENS, WIDTH["prefix"])}


def test_keys_and_values_lie_where_peft_puts_them(saved: dict[str, Path], base: Base) -> None:
    """[tokens, layer, key or value, head, width]: each number says where it should end."""
    method = Prefix()
    spec = method.parse(read(saved["prefix"]), base)
    flat = torch.arange(float(TOKENS * WIDTH["prefix"])).view(TOKENS, -1)
    bank = method.bank(base, 2, torch.device("cpu"), torch.float32)
    bank.put(2, method.pack(spec, base, {TENSOR: flat}, {}, torch.float32))
    start = bank.start(2)
    assert start is not None
    for token in range(TOKENS):
        for layer in range(2):
            key, value = flat[token].view(2, 2, 2, 4)[layer]
            assert torch.equal(start.keys[layer, token], key)
            assert torch.equal(start.values[layer, token], value)
    bank.clear(2)
    assert bank.start(2) is None


@pytest.mark.parametrize("kind", KINDS)
def test_training_starts_with_files_that_are_read_again(
    saved: dict[str, Path], base: Base, model: Any, kind: str, tmp_path: Path
) -> None:
    out = started(METHODS[kind], saved[kind], base, tmp_path / "started")
    with quiet(), torch.inference_mode():
        adapted = PeftModel.from_pretrained(model, out)
        assert torch.isfinite(adapted(torch.tensor([[1, 2, 3]])).logits).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(TOKENS + 1, 0), (TOKENS, 1), (TOKENS, -1), (TOKENS,), (1, TOKENS, 0)])
def test_wrong_shapes_are_refused(
    saved: dict[str, Path], base: Base, kind: str, shape: tuple[int, ...]
) -> None:
    """The last number is added to the right width."""
    files = read(saved[kind])
    wrong = reshaped(files.tensors[TENSOR], *shape[:-1], WIDTH[kind] + shape[-1])
    with pytest.raises(InvalidAdapter) as caught:
        METHODS[kind].parse(changed(files, {TENSOR: wrong}), base)
    assert caught.value.param == TENSOR


@pytest.mark.parametrize("kind", KINDS)
def test_missing_and_further_tensors_are_refused(saved: dict[str, Path], base: Base, kind: str) -> None:
    files, method = read(saved[kind]), METHODS[kind]
    info = files.tensors[TENSOR]
    with pytest.raises(InvalidAdapter, match="missing"):
        method.parse(changed(files, {}), base)
    for stray in (
        "base_model.model.lm_head.weight",
        "prompt_embeddings2",
        "prompt_encoder.weight",
        "x" * 250,
    ):
        with pytest.raises(InvalidAdapter) as caught:
            method.parse(changed(files, files.tensors | {stray: info}), base)
        assert caught.value.param == stray
        assert len(caught.value.message) < 300


REFUSED: dict[str, list[Any]] = {
    "num_virtual_tokens": [0, -1, 1025, 1 << 70, True, "5", None, 5.5, [5]],
    "num_transformer_submodules": [2, 0, True, "1"],
    "modules_to_save": [["lm_head"]],
    "token_dim": [HIDDEN + 1, 0, "16"],
    "task_type": ["SEQ_2_SEQ_LM"],
    "peft_type": ["CPT", "MULTITASK_PROMPT_TUNING", "ADAPTION_PROMPT"],
    "surprise": [1],
}


@pytest.mark.parametrize(("field", "value"), [(f, v) for f, values in REFUSED.items() for v in values])
@pytest.mark.parametrize("kind", KINDS)
def test_fields_that_say_something_else_are_refused(
    saved: dict[str, Path], base: Base, kind: str, field: str, value: Any
) -> None:
    with pytest.raises(InvalidAdapter, match=field) as caught:
        METHODS[kind].parse(changed(read(saved[kind]), **{field: value}), base)
    assert len(caught.value.message) < 300


@pytest.mark.parametrize(("field", "value"), [("num_layers", 3), ("num_attention_heads", 4)])
def test_a_prefix_for_other_layers_or_heads_is_refused(
    saved: dict[str, Path], base: Base, field: str, value: Any
) -> None:
    with pytest.raises(InvalidAdapter) as caught:
        Prefix().parse(changed(read(saved["prefix"]), **{field: value}), base)
    assert caught.value.param == field


def test_a_prefix_of_the_time_before_grouped_heads_is_refused_with_the_reason(
    saved: dict[str, Path], base: Base
) -> None:
    files = read(saved["prefix"])
    old = reshaped(files.tensors[TENSOR], TOKENS, 2 * 2 * HIDDEN)
    with pytest.raises(InvalidAdapter, match="older versions of PEFT"):
        Prefix().parse(changed(files, {TENSOR: old}, token_dim=HIDDEN, num_attention_heads=4), base)


@pytest.mark.parametrize("kind", KINDS)
def test_more_virtual_tokens_than_the_context_holds_are_refused(
    saved: dict[str, Path], base: Base, kind: str
) -> None:
    """The base's context is 32: one for a prompt, one for an answer, 30 at most."""
    files, method = read(saved[kind]), METHODS[kind]
    for tokens, fits in ((30, True), (31, False), (1024, False)):
        info = reshaped(files.tensors[TENSOR], tokens, WIDTH[kind])
        one = changed(files, {TENSOR: info}, num_virtual_tokens=tokens)
        if fits:
            method.parse(one, base)
            continue
        with pytest.raises(InvalidAdapter, match="room for 30") as caught:
            method.parse(one, base)
        assert caught.value.param == "num_virtual_tokens"


@pytest.mark.parametrize("kind", KINDS)
def test_values_that_overflow_the_engines_type_are_refused(
    saved: dict[str, Path], base: Base, kind: str
) -> None:
    method = METHODS[kind]
    spec = method.parse(read(saved[kind]), base)
    with pytest.raises(InvalidAdapter, match="overflows float16"):
        method.pack(spec, base, {TENSOR: torch.full((TOKENS, WIDTH[kind]), 1e30)}, {}, torch.float16)
