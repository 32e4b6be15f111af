"""Draft tokens for speculative decoding by prompt lookup: what followed the same n-gram the last time.

Texts repeat themselves and quote their prompts. A decoding row computes draft tokens along with its token and
accepts as many as equal what sampling, token by token, would have given, so drafts never change the answer.
A few more tokens cost a small batch hardly anything and a large one nearly their full price, so the length of
a draft follows the row's hit rate. That is measured for free on tokens that no draft contained.

Prompt lookup decoding: arXiv 2304.04487 (inference with reference).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

NGRAM = 3  # tokens that must match
AVERAGED_DRAFTS = 8  # the hit rate is a moving average over about so many predictions


@dataclass
class PromptLookup:
    """Index of the n-grams of one row, up to token `num_indexed`."""

    # n-gram -> index of the token after its last occurrence
    followers: dict[tuple[int, ...], int] = field(default_factory=dict)
    num_indexed: int = 0
    hit_rate: float = 0.5  # how often the index has predicted the next token lately

    def draft(self, tokens: list[int], limit: int, min_acceptance: float) -> list[int]:
        """Up to `limit` draft tokens, as many as are all right with a probability of `min_acceptance`."""
        self._index(tokens)
        start = self.followers.get(tuple(tokens[-NGRAM:])) if len(tokens) > NGRAM else None
        count = self._draft_length(limit, min_acceptance)
        if start is None or count < 1:
            return []
        draft = tokens[start : start + count]
        while len(draft) < count:  # the match reaches the end of `tokens`: go on with the draft itself
            draft.append(draft[start + len(draft) - len(tokens)])
        return draft

    def _index(self, tokens: list[int]) -> None:
        """Index the tokens that are new and update the hit rate by them."""
        for i in range(max(self.num_indexed, NGRAM), len(tokens)):
            gram = tuple(tokens[i - NGRAM : i])
            predicted = self.followers.get(gram)
            if predicted is not None:
                self.hit_rate += ((tokens[predicted] == tokens[i]) - self.hit_rate) / AVERAGED_DRAFTS
            self.followers[gram] = i
        self.num_indexed = len(tokens)

    def _draft_length(self, limit: int, min_acceptance: float) -> int:
        """The largest n with hit_rate ** n >= min_acceptance, at most `limit`."""
        if min_acceptance >= 1 or self.hit_rate <= 0:
            return 0
        if self.hit_rate >= 1:
            return limit
        return min(limit, math.floor(math.log(min_acceptance) / math.log(self.hit_rate)))


class Result(Protocol):
    """The sampled token at one position."""

    @property
    def token(self) -> int: ...
    @property
    def finite(self) -> bool: ...


def num_accepted(draft: Sequence[int], results: Sequence[Result], ends: Sequence[bool]) -> int:
    """How many of len(draft) + 1 results count: up to the first that differs from the draft or ends the row.

    A result with logits that are not finite is not accepted after others: the next step computes it again.
    """
    for i, token in enumerate(draft):
        if results[i].token != token or ends[i] or not results[i + 1].finite:
            return i + 1
    return len(draft) + 1
