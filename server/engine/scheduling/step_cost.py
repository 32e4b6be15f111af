"""Step time by number of tokens, which decides how long drafts may be (prompt_lookup.py).

Up to some number of tokens a step is bound by reading the weights, beyond that by arithmetic. Where the bend
is and how steep the second part is differ by a factor of four between machines, so a few steps are timed
while the engine is idle; until then it is assumed. Overhead that does not depend on the number of tokens,
mostly for bytes of adapters, is learnt from the steps that run.
"""

from collections.abc import Callable, Mapping
from itertools import pairwise

TIMED_TOKENS = (1, 8, 16, 24, 64)  # sizes of the timed steps; at 16 a tile of rows is full
MAX_TIMED_SECONDS = 0.2  # of one timed step: past it the model is too large to time the others
# in arbitrary units: a step costs two tokens and one for each of its tokens
DEFAULT_COSTS: Mapping[int, float] = {1: 3.0, 64: 66.0}
ACCEPTANCE_MARGIN = 1.1  # a draft that only breaks even lets rows drift apart, and batches become small
AVERAGED_STEPS = 16  # the overhead is a moving average over about so many steps
MIN_ACCEPTANCE = 0.02  # no lower acceptance is asked for: timings have noise


class StepCost:
    """Seconds of a step by its number of tokens, interpolated between the measured ones."""

    def __init__(self, costs: Mapping[int, float] = DEFAULT_COSTS) -> None:
        """`costs`: number of tokens -> seconds, at least two; or DEFAULT_COSTS, until all are measured."""
        self.costs = sorted(costs.items())
        self.overhead = 0.0  # seconds of a step beyond what `seconds` says
        self._has_seconds = costs is not DEFAULT_COSTS
        self._measured: dict[int, float] = {}
        self._unmeasured = [] if self._has_seconds else list(TIMED_TOKENS)

    @property
    def complete(self) -> bool:
        """There is nothing left to measure."""
        return not self._unmeasured

    def measure(self, seconds: Callable[[int], float]) -> None:
        """Time a step of the next size by `seconds`. DEFAULT_COSTS stay if one takes too long."""
        tokens = self._unmeasured.pop(0)
        self._measured[tokens] = seconds(tokens)
        if self._measured[tokens] > MAX_TIMED_SECONDS:
            self._unmeasured.clear()
        elif self.complete:
            self.costs, self._has_seconds = sorted(self._measured.items()), True

    def seconds(self, tokens: int) -> float:
        """Time of a step of `tokens` tokens without overhead."""
        for (low, before), (high, after) in pairwise(self.costs):
            if tokens <= high or high == self.costs[-1][0]:
                return before + (after - before) * (tokens - low) / (high - low)
        raise AssertionError("there are costs of at least two sizes")

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
        counts = [n - rows for n, _ in self.costs if rows < n < rows + draft_tokens] + [draft_tokens]
        per_token = max((self.seconds(rows + count) - now) / count for count in counts)
        acceptance = ACCEPTANCE_MARGIN * per_token * rows / (now + self.overhead)
        return min(max(acceptance, MIN_ACCEPTANCE), 1.0)
