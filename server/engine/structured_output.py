"""Structured output: the tokens that a row's JSON schema or grammar allows next, by llguidance.

A separate thread compiles them, so that a large one delays its own row only. The API has already refused
those that are too large or cannot be compiled; a matcher that fails here ends its row.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch
from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from server.errors import InvalidField
from server.kernels.transfers import send
from server.messages import GRAMMAR_HEADER, JSON_WHITESPACE

MAX_COMPILED = 64  # schemas and grammars in the LRU cache
PARSER_LIMITS = LLParserLimits(
    initial_lexer_fuel=1_000_000,
    step_lexer_fuel=100_000,  # for one row and step: 7 ms, during which all rows wait
    max_grammar_size=50_000,
    verbose_errors=False,
)


class Grammars:
    """Compiled grammars for one vocabulary. Reads the tokenizer on first use: most servers never need it."""

    def __init__(self, model_dir: Path, vocab_size: int, end_token_ids: frozenset[int]) -> None:
        self.model_dir = model_dir
        self.vocab_size = vocab_size
        self.end_token_ids = end_token_ids
        self._matcher_of: Callable[[str], LLMatcher] = lru_cache(MAX_COMPILED)(self._make_matcher)
        self._pool = ThreadPoolExecutor(1, "grammar")

    def compile(self, grammar: str) -> "Future[LLMatcher]":
        """A new matcher for Sampling.grammar; the future raises InvalidField if it cannot be compiled."""
        return self._pool.submit(self._compile, grammar)

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    @cached_property
    def _tokenizer(self) -> LLTokenizer:
        text = (self.model_dir / "tokenizer.json").read_text()
        return LLTokenizer(text, n_vocab=self.vocab_size, eos_token=sorted(self.end_token_ids))

    def _compile(self, grammar: str) -> LLMatcher:
        matcher = self._matcher_of(grammar).deep_copy()
        if matcher.is_error():
            raise InvalidField("What the answer must match cannot be compiled for this model.")
        return matcher

    def _make_matcher(self, grammar: str) -> LLMatcher:
        if not grammar.startswith(GRAMMAR_HEADER):
            overrides: Any = {"whitespace_pattern": JSON_WHITESPACE}
            grammar = LLMatcher.grammar_from_json_schema(grammar, overrides=overrides)
        return LLMatcher(self._tokenizer, grammar, log_level=0, limits=PARSER_LIMITS)


def consume(matcher: Any, token: int) -> bool:
    """Advance `matcher` by a sampled token; False if the grammar forbids it or the matcher ran out of fuel.

    A matcher without fuel allows the end token at once, so a truncated answer would look complete.
    """
    return bool(matcher.consume_token(token)) and not matcher.is_error()


def mask_logits(logits: torch.Tensor, matchers: list[tuple[int, Any]]) -> None:
    """Set the tokens that each (row, matcher) forbids to -inf, in place; logits [R, V]. No GPU sync."""
    words, device = -(-logits.shape[1] // 32), logits.device
    bits = torch.zeros(len(matchers), words, dtype=torch.int32, pin_memory=device.type == "cuda")
    for i, (_, matcher) in enumerate(matchers):
        matcher.unsafe_compute_mask_ptr(bits[i].data_ptr(), words * 4)
    device_bits = bits.to(device, non_blocking=True)
    allowed = (device_bits[:, :, None] >> torch.arange(32, dtype=torch.int32, device=device)) & 1
    forbidden = allowed.flatten(1)[:, : logits.shape[1]] == 0
    rows = send([row for row, _ in matchers], device)
    logits[rows] = logits[rows].masked_fill(forbidden, float("-inf"))
