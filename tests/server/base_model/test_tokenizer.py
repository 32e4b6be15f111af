"""The base's tokenizer: what loads, what a chat becomes, what a token shows as."""

from pathlib import Path

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from server.base_model.tokenizer import Tokenizer
from server.errors import InvalidRequest, StartupError
from tests.server.api.generation.tokenizers import byte_fallback_tokenizer, byte_level_tokenizer

BYTE_LEVEL = byte_level_tokenizer()
BYTE_FALLBACK = byte_fallback_tokenizer()


def test_part_of_a_character_shows_as_bytes() -> None:
    first = BYTE_LEVEL.encode("é", special=False)[0]
    assert BYTE_LEVEL.token_text(first) == ("bytes:\\xc3", b"\xc3")
    assert BYTE_LEVEL.token_text(10**6) == ("", b"")


def test_chat_is_rendered_by_the_models_template_and_refused_without_one() -> None:
    text = BYTE_LEVEL.render_chat([{"role": "user", "content": "{{ 1 + 1 }}"}])
    assert text == "<|user|>{{ 1 + 1 }}<|end|><|assistant|>"
    with pytest.raises(InvalidRequest, match="roles"):
        BYTE_LEVEL.render_chat([{"role": "assistant", "content": "first"}])
    with pytest.raises(InvalidRequest, match="no chat template"):
        BYTE_FALLBACK.render_chat([{"role": "user", "content": "hi"}])


def test_a_tokenizer_folder_loads_and_a_strange_decoder_is_refused(tmp_path: Path) -> None:
    byte_level_tokenizer(tmp_path)
    assert Tokenizer.load(tmp_path).encode("hello") == BYTE_LEVEL.encode("hello")
    strange = Backend(models.BPE({"a": 0}, []))
    strange.pre_tokenizer, strange.decoder = pre_tokenizers.Whitespace(), decoders.CTC()
    PreTrainedTokenizerFast(tokenizer_object=strange).save_pretrained(tmp_path / "strange")
    with pytest.raises(StartupError, match="CTC"):
        Tokenizer.load(tmp_path / "strange")


@pytest.mark.parametrize("files", [{}, {"config.json": "x"}, {"tokenizer.json": "{"}])
def test_a_folder_without_a_tokenizer_is_refused_in_a_sentence(tmp_path: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(StartupError, match="no tokenizer that can be loaded"):
        Tokenizer.load(tmp_path)


def test_a_part_has_the_tokens_it_has_in_the_whole() -> None:
    assert BYTE_LEVEL.encode_part("hello wo", 5, 8) == BYTE_LEVEL.encode(" wo")
    assert BYTE_FALLBACK.encode_part("x ab", 1, 4) == BYTE_FALLBACK.encode("x ab")[2:]


@pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, BYTE_FALLBACK])
def test_a_part_that_a_token_would_straddle_is_read_to_the_letter(tokenizer: Tokenizer) -> None:
    """A beginning would get a space in SentencePiece's way; a part must not."""
    part = tokenizer.encode_part("hello ab", 6, 8)
    assert "".join(tokenizer.token_text(token)[0] for token in part) == "ab"


def test_the_first_special_token_is_found_in_a_text() -> None:
    assert BYTE_LEVEL.up_to_special(" \n<|end|>\n<|user|>") == len(" \n<|end|>")
    assert BYTE_LEVEL.up_to_special("no end") is None


def test_a_chat_can_be_rendered_without_a_turn_to_answer() -> None:
    assert BYTE_LEVEL.render_chat([{"role": "user", "content": "a"}], answer=False) == "<|user|>a<|end|>"


def test_characters_stand_for_the_bytes_that_transformers_says() -> None:
    """The first 256 tokens are GPT-2's alphabet, in transformers' order."""
    assert [BYTE_LEVEL.token_text(token)[1] for token in range(256)] == [
        bytes([byte]) for byte in bytes_to_unicode()
    ]
