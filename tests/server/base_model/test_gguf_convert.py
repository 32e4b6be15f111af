"""The default model as it lies on the disk after the fetch: whole, plain, and the model it claims to be."""

import json
from pathlib import Path

import pytest
from safetensors import safe_open
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from server.base_model.compatibility import check_architecture


@pytest.fixture(scope="module")
def tokenizer(smollm2: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(smollm2, local_files_only=True)


def test_the_engine_can_serve_it(smollm2: Path) -> None:
    check_architecture(smollm2)


def test_nothing_of_the_gguf_is_left(smollm2: Path) -> None:
    names = {path.name for path in smollm2.iterdir()}
    assert {"config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja"} <= names
    assert not [name for name in names if name.endswith((".gguf", ".whl", ".bin", ".py", ".log"))]
    config = json.loads((smollm2 / "config.json").read_text())
    assert "quantization_config" not in config


def test_weights_are_float32_and_tied(smollm2: Path) -> None:
    with safe_open(smollm2 / "model.safetensors", "pt") as file:
        names = set(file.keys())
        assert {file.get_slice(name).get_dtype() for name in names} == {"F32"}
    assert "model.embed_tokens.weight" in names
    assert "lm_head.weight" not in names


def test_generation_ends_where_a_turn_ends(smollm2: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    generation = json.loads((smollm2 / "generation_config.json").read_text())
    assert tokenizer.convert_ids_to_tokens(generation["eos_token_id"]) == "<|im_end|>"


@pytest.mark.parametrize(
    "text", ["Hello, world!", "  two spaces\n\ttab", "naïve café - 東京 🦊", "a" * 300, ""]
)
def test_text_comes_back_as_it_went_in(text: str, tokenizer: PreTrainedTokenizerBase) -> None:
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_the_chat_template_is_the_models_own(tokenizer: PreTrainedTokenizerBase) -> None:
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert isinstance(text, str)
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.encode("<|im_end|>", add_special_tokens=False) == [2]
