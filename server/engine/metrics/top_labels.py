"""Counters by a label with any number of values: the top N have series of their own, all others share one.

Labels are ranked once a minute by their recent activity. A new label takes a free series at once, and that of
another label when it is twice as active. Memory is bounded whatever the number of labels.
"""

from collections.abc import Iterator, Mapping
from heapq import nlargest

from server.metrics.labels import OTHER

Label = tuple[str, ...]
REVIEW_SECONDS = 60.0
CANDIDATES_PER_SERIES = 8  # labels whose activity is tracked, for each series
REPLACE_FACTOR = 2.0  # a label takes the series of another when it is so many times as active


class TopLabels:
    """The counters `keys` of the `top` most active labels and of the rest."""

    def __init__(self, keys: tuple[str, ...], labels: int, top: int) -> None:
        """`labels`: how many values a label has."""
        self.keys = keys
        self.top = top
        self.rest: Label = (OTHER,) * labels
        self.counts: dict[Label, dict[str, float]] = {self.rest: dict.fromkeys(keys, 0.0)}
        self._scores: dict[Label, float] = {}
        self._review_at = 0.0

    def add(self, label: Label, activity: float, amounts: Mapping[str, float]) -> None:
        """Add `amounts` to the counters of `label`; `activity` counts towards its rank."""
        self._scores[label] = self._scores.get(label, 0.0) + activity
        counts = self.counts.get(label)
        if counts is None and len(self.counts) <= self.top:
            counts = self.counts[label] = dict.fromkeys(self.keys, 0.0)
        if counts is None:
            counts = self.counts[self.rest]
            if len(self._scores) > CANDIDATES_PER_SERIES * self.top + self.top:
                self._forget_idle()
        for key, amount in amounts.items():
            counts[key] += amount

    def review(self, now: float) -> None:
        """Rank the labels again if a minute has passed since the last time; call it often."""
        if now < self._review_at:
            return
        first, self._review_at = self._review_at == 0.0, now + REVIEW_SECONDS
        if first:  # activity has not been counted for long enough
            return
        ranked = sorted((self._scores.get(label, 0.0), label) for label in self.counts if label != self.rest)
        free = self.top - len(ranked)
        for label in nlargest(self.top, self._scores, key=self._scores.__getitem__):
            if label in self.counts:
                continue
            if free:
                free -= 1
            elif ranked and self._scores[label] > REPLACE_FACTOR * ranked[0][0]:
                del self.counts[ranked.pop(0)[1]]
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
        """Continue from the `counts` of a previous process; labels beyond `top` are dropped."""
        for label, counts in series.items():
            if label == self.rest or (len(label) == len(self.rest) and len(self.counts) <= self.top):
                self.counts[label] = {key: counts.get(key, 0.0) for key in self.keys}

    def _forget_idle(self) -> None:
        """Stop tracking the less active half of the labels; an active one comes back."""
        most_active = nlargest(len(self._scores) // 2, self._scores, key=self._scores.__getitem__)
        self._scores = {label: self._scores[label] for label in most_active}
