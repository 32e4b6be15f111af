"""Stop strings over a stream of text: nothing that could still become a stop string is let out."""


class StopScanner:
    """Cuts a stream before the first stop string that completes, wherever the chunks are cut.

    One Knuth-Morris-Pratt automaton a stop string: a character costs O(1) amortised for each, and what is
    held back is exactly the longest match in progress.
    """

    def __init__(self, stops: list[str]) -> None:
        self._stops = [(stop, _failures(stop)) for stop in stops]
        self._matched = [0] * len(stops)  # characters of each stop string matched so far
        self._held = ""
        self.found = False

    def push(self, text: str) -> str:
        """The text that is safe to send. After `found` the stream is over and nothing more comes out."""
        if not self._stops or self.found:
            return "" if self.found else text
        buffer, start = self._held + text, len(self._held)
        for end in range(start, len(buffer)):
            complete = self._step(buffer[end])
            if complete:
                self.found, self._held = True, ""
                return buffer[: end + 1 - complete]
        safe = len(buffer) - max(self._matched)
        self._held = buffer[safe:]
        return buffer[:safe]

    def flush(self) -> str:
        """The text held back, once no more is coming."""
        held, self._held = self._held, ""
        return held

    def _step(self, char: str) -> int:
        """Advance every automaton; the length of the longest stop string that ends here, or 0."""
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


def _failures(stop: str) -> list[int]:
    """For each prefix of `stop`, the length of its longest proper suffix that is also a prefix."""
    failures = [0] * len(stop)
    matched = 0
    for i in range(1, len(stop)):
        while matched and stop[matched] != stop[i]:
            matched = failures[matched - 1]
        matched += stop[matched] == stop[i]
        failures[i] = matched
    return failures
