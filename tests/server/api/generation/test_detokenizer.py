"""Incremental text equals the whole decode, and no part of a stop string gets out."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.api.generation.detokenizer import detokenizer
from server.api.generation.stop_strings import StopScanner
from server.base_model.tokenizer import Tokenizer
from tests.server.api.generation.tokenizers import byte_fallback_tokenizer, byte_level_tokenizer

BYTE_LEVEL = byte_level_tokenizer()
BYTE_FALLBACK = byte_fallback_tokenizer()
TOKENIZERS = {"byte-level": BYTE_LEVEL, "byte-fallback": BYTE_FALLBACK}

ids = st.lists(st.integers(0, 310), max_size=40)  # some are special, some beyond the vocabulary


def streamed(tokenizer: Tokenizer, tokens: list[int]) -> str:
    decoder = detokenizer(tokenizer)
    return "".join([decoder.push(token) for token in tokens]) + decoder.flush()


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
    decoder = detokenizer(tokenizer)
    out = "".join([decoder.push(token) for token in tokens]) + decoder.flush()
    assert out.removeprefix(" ") == "x" + text


def test_half_a_character_is_held_back() -> None:
    tokens = BYTE_LEVEL.encode("🙂", special=False)
    decoder = detokenizer(BYTE_LEVEL)
    assert len(tokens) == 4
    assert [decoder.push(token) for token in tokens] == ["", "", "", "🙂"]


def test_special_tokens_are_skipped_in_text_and_shown_in_logprobs() -> None:
    end = BYTE_LEVEL.encode("<|end|>", special=False)
    assert len(end) == 1
    assert streamed(BYTE_LEVEL, end) == ""
    assert BYTE_LEVEL.token_text(end[0]) == ("<|end|>", b"<|end|>")


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
