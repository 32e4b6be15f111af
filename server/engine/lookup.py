"""What may come next in a row: what came after the same few tokens the last time they stood there.

Texts repeat themselves and quote their prompts. A row that decodes computes its guesses along with its token:
a batch of a few more tokens costs hardly more, and as many are kept as turn out to be what sampling, token by
token, would have given. The answer is the same whether anything is guessed or not.

Prompt lookup decoding: arXiv 2304.04487 (inference with reference).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

NGRAM = 3  # tokens that must have stood there before
FIRST = 2.0  # guesses of a row of which nothing is known yet
REST = 16  # tokens without a guess, after guesses that were all wrong


@dataclass
class Lookup:
    """Of one row. Knows its tokens up to `read`."""

    after: dict[tuple[int, ...], int] = field(default_factory=dict)  # tokens -> what followed, the last time
    read: int = 0
    trust: float = FIRST  # how many tokens to guess
    resting_until: int = 0  # tokens of the row

    def guess(self, tokens: list[int], most: int) -> list[int]:
        """Up to `most` tokens that may follow."""
        count = min(int(self.trust), most)
        if count < 1 or len(tokens) <= max(NGRAM, self.resting_until):
            return []
        for end in range(max(self.read, NGRAM), len(tokens)):
            self.after[tuple(tokens[end - NGRAM : end])] = end
        self.read = len(tokens)
        start = self.after.get(tuple(tokens[-NGRAM:]))
        if start is None:
            return []
        found = tokens[start : start + count]
        while len(found) < count:  # they repeat themselves up to here: so may what comes
            found.append(found[start + len(found) - len(tokens)])
        return found

    def learn(self, guessed: int, right: int, length: int) -> None:
        """Of the last `guessed` tokens so many were `right`; the row has `length` by now."""
        if right == guessed:
            self.trust = max(self.trust, 2.0 * guessed)
        elif right:
            self.trust = right + 1.0
        else:
            self.trust = FIRST
            self.resting_until = length + REST


class Result(Protocol):
    """What sampling gave at one place."""

    @property
    def token(self) -> int: ...
    @property
    def finite(self) -> bool: ...


def standing(guess: Sequence[int], results: Sequence[Result], ends: Sequence[bool]) -> int:
    """How many results stand, of one more than guesses: up to the first token that was not guessed, or that
    ends its row. One that is not finite will be asked for again, by itself.
    """
    for i, guessed in enumerate(guess):
        if results[i].token != guessed or ends[i] or not results[i + 1].finite:
            return i + 1
    return len(guess) + 1
