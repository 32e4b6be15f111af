"""What a step of so many tokens takes on this machine: told by a few that were timed before the first row.

Up to some number of tokens a step takes the time of the weights' bytes, beyond it that of the sums; where
the one ends and how fast the other grows, machines differ by a factor of four. What steps take beside that,
for the bytes of adapters above all, no guess makes more of: it is told by steps that run.
"""

from collections.abc import Callable
from itertools import pairwise

TIMED = (1, 8, 16, 24, 64)  # tokens; at 16 a tile of rows is full
LONG = 0.2  # seconds of a step: a model so large is not kept waiting for more of them
USUAL = {1: 3.0, 64: 66.0}  # of no unit: a step costs what two tokens do, and its tokens
MARGIN = 1.1  # a guess that only earns its time also lets the rows drift apart, and batches become small
MEMORY = 16  # about how many steps that ran are remembered
LEAST = 0.02  # likelihood at which anything pays; timings have noise


class StepCost:
    """Seconds of a step by its tokens, in straight lines between those that are known."""

    def __init__(self, known: dict[int, float]) -> None:
        self.known = sorted(known.items())
        self._seconds = known != USUAL
        self.beside = 0.0  # of a step, for what these do not tell of

    @classmethod
    def timed(cls, seconds: Callable[[int], float]) -> "StepCost":
        """`seconds` times a step of so many tokens."""
        known: dict[int, float] = {}
        for tokens in TIMED:
            known[tokens] = seconds(tokens)
            if known[tokens] > LONG:
                return cls(USUAL)
        return cls(known)

    def of(self, tokens: int) -> float:
        for (low, before), (high, after) in pairwise(self.known):
            if tokens <= high or high == self.known[-1][0]:
                return before + (after - before) * (tokens - low) / (high - low)
        raise AssertionError("two are known at least")

    def saw(self, tokens: int, seconds: float) -> None:
        """A step of rows that decode, with so many tokens, has run."""
        if self._seconds:
            self.beside += (max(0.0, seconds - self.of(tokens)) - self.beside) / MEMORY

    def worth(self, rows: int, guesses: int) -> float:
        """How likely each of so many guesses must be right to be worth its time, in a step of so many rows:
        with them, or with fewer, there are more tokens a second than without. 1: not even a sure one is.
        """
        if not guesses:
            return 1.0
        now = self.of(rows)
        counts = [n - rows for n, _ in self.known if rows < n < rows + guesses] + [guesses]
        more = max((self.of(rows + count) - now) / count for count in counts)
        return min(max(MARGIN * more * rows / (now + self.beside), LEAST), 1.0)
