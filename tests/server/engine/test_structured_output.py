"""What a schema's patterns allow, and what becomes of a row whose matcher has no fuel left."""

import json
import re
from pathlib import Path

import pytest
import torch
from llguidance import LLMatcher, LLParserLimits

from server.engine import structured_output as grammar
from server.engine.structured_output import Grammars, consume, mask_logits
from server.errors import InvalidField
from server.messages import GRAMMAR_HEADER
from tests.fixtures.cost import processor_seconds
from tests.server.api.generation.tokenizers import VOCABULARY, byte_level_tokenizer


def matcher_of(folder: Path, schema: dict[str, object] | str) -> tuple[LLMatcher, int]:
    """A matcher over the small tokenizer, and the token that ends a row."""
    end = byte_level_tokenizer(folder).end
    assert end is not None
    grammars = Grammars(folder, VOCABULARY, frozenset({end}))
    try:
        text = schema if isinstance(schema, str) else json.dumps(schema)
        return grammars.compile(text).result(), end
    finally:
        grammars.close()


@pytest.mark.parametrize("pattern", ["^[0-9]{5}$", "^(he|llo)+$", "^a.?b$"])
def test_an_answer_matches_its_pattern(tmp_path: Path, pattern: str) -> None:
    matcher, end = matcher_of(tmp_path, {"type": "string", "pattern": pattern, "maxLength": 40})
    text = json.loads(byte_level_tokenizer().decode(drawn(matcher, end)))
    assert re.fullmatch(pattern, text)


@pytest.mark.parametrize(
    ("lark", "whole"), [('start: "yes" | "n\\u00e9\\""', 'yes|né"'), ("start: /[ab]{3}\\/x/", "[ab]{3}/x")]
)
def test_an_answer_matches_its_grammar_as_a_whole(tmp_path: Path, lark: str, whole: str) -> None:
    matcher, end = matcher_of(tmp_path, f"{GRAMMAR_HEADER}\n{lark}")
    tokens = drawn(matcher, end)
    assert re.fullmatch(whole, byte_level_tokenizer().decode(tokens))


def drawn(matcher: LLMatcher, end: int) -> list[int]:
    """Random tokens that the matcher allows, up to the end."""
    generator = torch.Generator().manual_seed(0)
    tokens: list[int] = []
    while end not in tokens:
        logits = torch.rand(1, VOCABULARY, generator=generator)
        mask_logits(logits, [(0, matcher)])
        tokens.append(int(logits.argmax()))
        assert consume(matcher, tokens[-1])
        assert len(tokens) < 200
    return tokens


def test_a_matcher_without_fuel_ends_its_row_in_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It lets nothing but the end through, which must not pass for the answer's own."""
    monkeypatch.setattr(grammar, "PARSER_LIMITS", LLParserLimits(step_lexer_fuel=1, verbose_errors=False))
    matcher, end = matcher_of(tmp_path, {"type": "string", "pattern": "^(.*[ab].{30}){30}$"})
    (quote,) = _allowed(matcher)
    assert consume(matcher, quote)
    assert _allowed(matcher) == [end]
    assert not consume(matcher, end)


def test_a_pattern_that_explodes_ends_its_row_and_costs_no_step_much(tmp_path: Path) -> None:
    matcher, _ = matcher_of(
        tmp_path, GRAMMAR_HEADER + "\nstart: /" + "((a{0,999}){0,999}){0,999}b" * 100 + "/"
    )
    (token,) = byte_level_tokenizer().encode("a", special=False)
    with processor_seconds(20):
        steps = next(step for step in range(1000) if not (_allowed(matcher) and consume(matcher, token)))
    assert steps > 0


def _allowed(matcher: LLMatcher) -> list[int]:
    logits = torch.zeros(1, VOCABULARY)
    mask_logits(logits, [(0, matcher)])
    return [int(token) for token in torch.isfinite(logits[0]).nonzero()]


def test_a_grammar_is_compiled_like_a_schema(tmp_path: Path) -> None:
    end = byte_level_tokenizer(tmp_path).end
    assert end is not None
    grammars = Grammars(tmp_path, VOCABULARY, frozenset({end}))
    try:
        matcher = grammars.compile(f'{GRAMMAR_HEADER}\nstart: "a" "b"').result()
        for text in "ab":
            (token,) = _allowed(matcher)
            assert byte_level_tokenizer().decode([token]) == text
            assert consume(matcher, token)
        assert _allowed(matcher) == [end]
        with pytest.raises(InvalidField, match="must match cannot be compiled"):
            grammars.compile(f"{GRAMMAR_HEADER}\nstart: nothing").result()
    finally:
        grammars.close()
