"""Step time by number of tokens, which decides how long drafts may be (prompt_lookup.py).

Up to some number of tokens a step is bound by reading the weights, beyond that by arithmetic. Where the bend
is and how steep the second part is differ by a factor of four between machines, so a few steps are timed
before the first row runs. Overhead that does not depend on the number of tokens, mostly for bytes of
adapters, is learnt from the steps that run.
"""

from collections.abc import Callable
from itertools import pairwise

TIMED_TOKENS = (1, 8, 16, 24, 64)  # sizes of the timed steps; at 16 a tile of rows is full
MAX_TIMED_SECONDS = 0.2  # of one timed step: past it the model is too large to time the others
# in arbitrary units: a step costs two tokens and one for each of its tokens
DEFAULT_COSTS = {1: 3.0, 64: 66.0}
ACCEPTANCE_MARGIN = 1.1  # a draft that only breaks even lets rows drift apart, and batches become small
AVERAGED_STEPS = 16  # the overhead is a moving average over about so many steps
MIN_ACCEPTANCE = 0.02  # no lower acceptance is asked for: timings have noise


class StepCost:
    """Seconds of a step by its number of tokens, interpolated between the measured ones."""

    def __init__(self, measured: dict[int, float]) -> None:
        """`measured`: number of tokens -> seconds, at least two."""
        self.measured = sorted(measured.items())
        self._has_seconds = measured != DEFAULT_COSTS
        self.overhead = 0.0  # seconds of a step beyond what `seconds` says

    @classmethod
    def timed(cls, seconds: Callable[[int], float]) -> "StepCost":
        """Costs of TIMED_TOKENS as `seconds` measures them; DEFAULT_COSTS if that takes too long."""
        measured: dict[int, float] = {}
        for tokens in TIMED_TOKENS:
            measured[tokens] = seconds(tokens)
            if measured[tokens] > MAX_TIMED_SECONDS:
                return cls(DEFAULT_COSTS)
        return cls(measured)

    def seconds(self, tokens: int) -> float:
        """Time of a step of `tokens` tokens without overhead."""
        for (low, before), (high, after) in pairwise(self.measured):
            if tokens <= high or high == self.measured[-1][0]:
                return before + (after - before) * (tokens - low) / (high - low)
        raise AssertionError("at least two step sizes are measured")

    def record(self, tokens: int, seconds: float) -> None:
        """Update the overhead by a decode step that has run."""
        if self._has_seconds:
            self.overhead += (max(0.0, seconds - self.seconds(tokens)) - self.overhead) / AVERAGED_STEPS

    def min_acceptance(self, rows: int, draft_tokens: int) -> float:
        """The probability from which on draft tokens raise the tokens per second.

        The batch decodes `rows` rows and computes up to `draft_tokens` draft tokens. 1 means that no draft
        pays, not even one that is sure to be accepted.
        """
        if not draft_tokens:
            return 1.0
        now = self.seconds(rows)
        counts = [n - rows for n, _ in self.measured if rows < n < rows + draft_tokens] + [draft_tokens]
        per_token = max((self.seconds(rows + count) - now) / count for count in counts)
        acceptance = ACCEPTANCE_MARGIN * per_token * rows / (now + self.overhead)
        return min(max(acceptance, MIN_ACCEPTANCE), 1.0)
