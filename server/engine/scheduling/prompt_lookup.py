"""What may come next in a row: what came after the same few tokens the last time they stood there.

Texts repeat themselves and quote their prompts. A row that decodes computes its guesses along with its token,
and as many are kept as turn out to be what sampling, token by token, would have given: the answer is the same
whether anything is guessed or not. A few more tokens cost a small batch hardly anything and a large one
nearly their full price, so a row guesses only as far ahead as it is right often enough; how often, it learns
for nothing from tokens that it has not guessed.

Prompt lookup decoding: arXiv 2304.04487 (inference with reference).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

NGRAM = 3  # tokens that must have stood there before
MEMORY = 8  # about how many past guesses the share remembers


@dataclass
class PromptLookup:
    """Of one row. Knows its tokens up to `read`."""

    after: dict[tuple[int, ...], int] = field(default_factory=dict)  # tokens -> what followed, the last time
    read: int = 0
    share: float = 0.5  # of what it would have guessed lately, how much was right

    def guess(self, tokens: list[int], most: int, worth: float) -> list[int]:
        """Up to `most` tokens that may follow, as long as they are right with a likelihood of `worth`."""
        self._read(tokens)
        start = self.after.get(tuple(tokens[-NGRAM:])) if len(tokens) > NGRAM else None
        count = self._reach(most, worth)
        if start is None or count < 1:
            return []
        found = tokens[start : start + count]
        while len(found) < count:  # they repeat themselves up to here: so may what comes
            found.append(found[start + len(found) - len(tokens)])
        return found

    def _read(self, tokens: list[int]) -> None:
        for i in range(max(self.read, NGRAM), len(tokens)):
            gram = tuple(tokens[i - NGRAM : i])
            seen = self.after.get(gram)
            if seen is not None:
                self.share += ((tokens[seen] == tokens[i]) - self.share) / MEMORY
            self.after[gram] = i
        self.read = len(tokens)

    def _reach(self, most: int, worth: float) -> int:
        """How many guesses one after the other are all right with this likelihood."""
        if worth >= 1 or self.share <= 0:
            return 0
        if self.share >= 1:
            return most
        return min(most, math.floor(math.log(worth) / math.log(self.share)))


class Result(Protocol):
    """What sampling gave at one place."""

    @property
    def token(self) -> int: ...
    @property
    def finite(self) -> bool: ...


def num_accepted(guess: Sequence[int], results: Sequence[Result], ends: Sequence[bool]) -> int:
    """How many results stand, of one more than guesses: up to the first token that was not guessed, or that
    ends its row. One that is not finite will be asked for again, by itself.
    """
    for i, guessed in enumerate(guess):
        if results[i].token != guessed or ends[i] or not results[i + 1].finite:
            return i + 1
    return len(guess) + 1
