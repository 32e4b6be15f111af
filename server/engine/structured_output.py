"""Structured output: which tokens a row's JSON schema allows next, by llguidance.

Schemas are compiled on a thread of their own, so that a large one delays its own row alone. The API has
already refused what is too large or cannot be compiled; a matcher that fails here ends its row.
"""

from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from server.errors import InvalidField
from server.kernels.transfers import send

KEPT = 64  # compiled schemas, least recently used first to go
WHITESPACE = r"[ \n\r\t]{0,40}"  # between tokens of JSON: a model that loves blanks must get on some time
LIMITS = LLParserLimits(
    initial_lexer_fuel=1_000_000,
    step_lexer_fuel=100_000,  # of one row in one step: 7 ms, which all rows of the step wait for
    max_grammar_size=50_000,
    verbose_errors=False,
)


class Grammars:
    """Compiled schemas over one model's vocabulary. Built on first use: most servers never need it."""

    def __init__(self, model_dir: Path, vocab_size: int, ends: frozenset[int]) -> None:
        self.model_dir = model_dir
        self.vocab_size = vocab_size
        self.ends = ends
        self._compiled: OrderedDict[str, LLMatcher] = OrderedDict()
        self._pool = ThreadPoolExecutor(1, "grammar")

    def compile(self, schema: str) -> "Future[LLMatcher]":
        """A fresh matcher for a JSON schema; InvalidField if it cannot be compiled."""
        return self._pool.submit(self._compile, schema)

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    @cached_property
    def _tokenizer(self) -> LLTokenizer:
        text = (self.model_dir / "tokenizer.json").read_text()
        return LLTokenizer(text, n_vocab=self.vocab_size, eos_token=sorted(self.ends))

    def _compile(self, schema: str) -> LLMatcher:
        if schema not in self._compiled:
            grammar = LLMatcher.grammar_from_json_schema(schema, overrides={"whitespace_pattern": WHITESPACE})
            self._compiled[schema] = LLMatcher(self._tokenizer, grammar, log_level=0, limits=LIMITS)
            while len(self._compiled) > KEPT:
                self._compiled.popitem(last=False)
        self._compiled.move_to_end(schema)
        matcher = self._compiled[schema].deep_copy()
        if matcher.is_error():
            raise InvalidField("response_format cannot be compiled for this model.", param="response_format")
        return matcher


def consume(matcher: Any, token: int) -> bool:
    """Tell `matcher` what was drawn; False if it does not fit, or the matcher ran out of fuel on the way.

    A matcher without fuel lets a row end at once: without this its cut answer would pass for a whole one.
    """
    return bool(matcher.consume_token(token)) and not matcher.is_error()


def mask_logits(logits: torch.Tensor, matchers: list[tuple[int, Any]]) -> None:
    """Set what each (row, matcher) forbids to -inf, in place; logits [R, V]. A GPU is not waited for."""
    words, device = -(-logits.shape[1] // 32), logits.device
    bits = torch.zeros(len(matchers), words, dtype=torch.int32, pin_memory=device.type == "cuda")
    for i, (_row, matcher) in enumerate(matchers):
        matcher.unsafe_compute_mask_ptr(bits[i].data_ptr(), words * 4)
    sent = bits.to(device, non_blocking=True)
    allowed = (sent[:, :, None] >> torch.arange(32, dtype=torch.int32, device=device)) & 1
    forbidden = allowed.flatten(1)[:, : logits.shape[1]] == 0
    rows = send([row for row, _matcher in matchers], device)
    logits[rows] = logits[rows].masked_fill(forbidden, float("-inf"))
