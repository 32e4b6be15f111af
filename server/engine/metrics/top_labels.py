"""Counters by a label of which there may be any number: the busiest have series, all others share one.

Who is busy is judged by what was counted lately, once a minute. A newcomer takes a free place at once, and
somebody's place when it is twice as busy. Memory is bounded however many labels come.
"""

from collections.abc import Iterator, Mapping
from heapq import nlargest

from server.metrics.names import OTHER

Label = tuple[str, ...]
REVIEW_SECONDS = 60.0
CANDIDATES = 8  # labels watched for each place
PREFERENCE = 2.0


class TopLabels:
    def __init__(self, keys: tuple[str, ...], labels: int, top: int) -> None:
        """Of each label, `labels` values long, the counters `keys`; at most `top` of them have series."""
        self.keys = keys
        self.top = top
        self.rest: Label = (OTHER,) * labels
        self.counts: dict[Label, dict[str, float]] = {self.rest: dict.fromkeys(keys, 0.0)}
        self._scores: dict[Label, float] = {}
        self._review_at = 0.0

    def add(self, label: Label, busy: float, amounts: Mapping[str, float]) -> None:
        """`busy` is how much this says for a series of its own."""
        self._scores[label] = self._scores.get(label, 0.0) + busy
        counts = self.counts.get(label)
        if counts is None and len(self.counts) <= self.top:
            counts = self.counts[label] = dict.fromkeys(self.keys, 0.0)
        if counts is None:
            counts = self.counts[self.rest]
            if len(self._scores) > CANDIDATES * self.top + self.top:
                self._forget_idle()
        for key, amount in amounts.items():
            counts[key] += amount

    def review(self, now: float) -> None:
        """Call it often; once a minute places change hands."""
        if now < self._review_at:
            return
        first, self._review_at = self._review_at == 0.0, now + REVIEW_SECONDS
        if first:  # nobody is known long enough to be judged
            return
        seated = sorted((self._scores.get(label, 0.0), label) for label in self.counts if label != self.rest)
        free = self.top - len(seated)
        for label in nlargest(self.top, self._scores, key=self._scores.__getitem__):
            if label in self.counts:
                continue
            if free:
                free -= 1
            elif seated and self._scores[label] > PREFERENCE * seated[0][0]:
                del self.counts[seated.pop(0)[1]]
            else:
                break
            self.counts[label] = dict.fromkeys(self.keys, 0.0)
        self._scores = {label: score / 2 for label, score in self._scores.items() if score >= 1}

    def series(self) -> Iterator[tuple[str, Label, float]]:
        """(counter, label, value) of every series."""
        for label, counts in self.counts.items():
            for key, value in counts.items():
                yield key, label, value

    def restore(self, series: Mapping[Label, Mapping[str, float]]) -> None:
        """Go on from what `counts` was; more than fit now are left out."""
        for label, counts in series.items():
            if label == self.rest or (len(label) == len(self.rest) and len(self.counts) <= self.top):
                self.counts[label] = {key: counts.get(key, 0.0) for key in self.keys}

    def _forget_idle(self) -> None:
        """The idler half of the watched: what is worth a place comes again."""
        kept = nlargest(len(self._scores) // 2, self._scores, key=self._scores.__getitem__)
        self._scores = {label: self._scores[label] for label in kept}
