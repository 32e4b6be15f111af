"""Incremental text equals the whole decode, and no part of a stop string gets out."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from server.api.stops import StopScanner
from server.api.text import Tokenizer
from server.errors import InvalidRequest, StartupError
from tests.server.api.tokenizers import byte_fallback_tokenizer, byte_level_tokenizer

BYTE_LEVEL = byte_level_tokenizer()
BYTE_FALLBACK = byte_fallback_tokenizer()
TOKENIZERS = {"byte-level": BYTE_LEVEL, "byte-fallback": BYTE_FALLBACK}

ids = st.lists(st.integers(0, 310), max_size=40)  # some are special, some beyond the vocabulary


def streamed(tokenizer: Tokenizer, tokens: list[int]) -> str:
    detokenizer = tokenizer.detokenizer()
    return "".join([detokenizer.push(token) for token in tokens]) + detokenizer.flush()


@pytest.mark.parametrize("name", TOKENIZERS)
@given(tokens=ids)
def test_random_tokens_decode_the_same_piece_by_piece(name: str, tokens: list[int]) -> None:
    tokenizer = TOKENIZERS[name]
    before = tokenizer.encode("x", special=False)
    prompt = tokenizer.decode(before)
    assert prompt + streamed(tokenizer, tokens) == tokenizer.decode(before + tokens)


@pytest.mark.parametrize("name", TOKENIZERS)
@given(
    text=st.text(alphabet=st.one_of(st.sampled_from("aé漢🙂 \n"), st.characters(codec="utf-8")), max_size=30)
)
def test_any_text_survives_a_round_trip(name: str, text: str) -> None:
    tokenizer = TOKENIZERS[name]
    tokens = tokenizer.encode("x" + text, special=False)
    detokenizer = tokenizer.detokenizer()
    out = "".join([detokenizer.push(token) for token in tokens]) + detokenizer.flush()
    assert out.removeprefix(" ") == "x" + text


def test_half_a_character_is_held_back() -> None:
    tokens = BYTE_LEVEL.encode("🙂", special=False)
    detokenizer = BYTE_LEVEL.detokenizer()
    assert len(tokens) == 4
    assert [detokenizer.push(token) for token in tokens] == ["", "", "", "🙂"]


def test_special_tokens_are_skipped_in_text_and_shown_in_logprobs() -> None:
    end = BYTE_LEVEL.encode("<|end|>", special=False)
    assert len(end) == 1
    assert streamed(BYTE_LEVEL, end) == ""
    assert BYTE_LEVEL.token_text(end[0]) == ("<|end|>", b"<|end|>")


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


stops = st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=4)


@given(stops=stops, chunks=st.lists(st.text("abc", max_size=5), max_size=12))
def test_the_cut_is_before_the_first_stop_to_complete_however_text_is_chunked(
    stops: list[str], chunks: list[str]
) -> None:
    text = "".join(chunks)
    ends = [(text.find(s) + len(s), -len(s)) for s in stops if s in text]
    expected = text[: sum(min(ends))] if ends else text

    scanner, out = StopScanner(stops), ""
    for chunk in chunks:
        out += scanner.push(chunk)
        assert expected.startswith(out), "part of a stop string, or text after it, got out"
    assert scanner.found == bool(ends)
    assert out + scanner.flush() == expected


@given(stops=stops, text=st.text("abc", max_size=30))
def test_no_more_is_held_back_than_could_become_a_stop(stops: list[str], text: str) -> None:
    scanner = StopScanner(stops)
    out = scanner.push(text)
    if not scanner.found:
        held = text[len(out) :]
        longest = max(
            (n for n in range(len(text) + 1) for s in stops if n < len(s) and text.endswith(s[:n])), default=0
        )
        assert len(held) == longest
