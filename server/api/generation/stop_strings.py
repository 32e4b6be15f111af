"""Finds stop strings in a stream of text, and withholds text that may be the beginning of one."""

from functools import lru_cache

CACHED_STOPS = 4096  # a request's choices have the same, and so have most requests of a client


class StopScanner:
    """Ends a stream before the first stop string that completes, or behind it if it is `kept`, however the
    text is cut into chunks.

    One Knuth-Morris-Pratt automaton for each stop string: a character costs each O(1) amortised, and a text
    without any stop's first character hardly anything. The withheld text is exactly the longest match in
    progress.
    """

    def __init__(self, stops: list[str], *, kept: bool = False) -> None:
        self._kept = kept
        self._first = frozenset(stop[0] for stop in stops)
        self._stops = [(stop, _failures(stop)) for stop in stops]
        self._matched = [0] * len(stops)  # characters of each stop string matched so far
        self._withheld = ""
        self.found = False  # a stop string has completed: no more text comes out

    def push(self, text: str) -> str:
        """The text that is safe to send."""
        if not self._stops or self.found:
            return "" if self.found else text
        if not self._withheld and self._first.isdisjoint(text):
            return text
        buffer, start = self._withheld + text, len(self._withheld)
        for end in range(start, len(buffer)):
            complete = self._step(buffer[end])
            if complete:
                self.found, self._withheld = True, ""
                return buffer[: end + 1 - (0 if self._kept else complete)]
        safe = len(buffer) - max(self._matched)
        self._withheld = buffer[safe:]
        return buffer[:safe]

    def flush(self) -> str:
        """The withheld text, at the end of the stream."""
        withheld, self._withheld = self._withheld, ""
        return withheld

    def _step(self, char: str) -> int:
        """Advance every automaton. Returns the length of the longest stop string that ends here, or 0."""
        complete = 0
        for i, (stop, failures) in enumerate(self._stops):
            matched = self._matched[i]
            while matched and stop[matched] != char:
                matched = failures[matched - 1]
            matched += stop[matched] == char
            self._matched[i] = matched
            if matched == len(stop):
                complete = max(complete, matched)
        return complete


@lru_cache(CACHED_STOPS)
def _failures(stop: str) -> tuple[int, ...]:
    """For each prefix of `stop`, the length of its longest proper suffix that is also a prefix."""
    failures = [0] * len(stop)
    matched = 0
    for i in range(1, len(stop)):
        while matched and stop[matched] != stop[i]:
            matched = failures[matched - 1]
        matched += stop[matched] == stop[i]
        failures[i] = matched
    return tuple(failures)
