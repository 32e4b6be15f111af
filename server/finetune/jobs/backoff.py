"""How long until something is tried again: each time twice as long, up to a limit. No I/O."""

import time
from collections.abc import Collection


class Backoff:
    def __init__(self, first: float, longest: float) -> None:
        """In seconds."""
        self._first = first
        self._longest = longest
        self._waiting: dict[
            str, tuple[float, float]
        ] = {}  # key -> its delay, and when (monotonic) it is over

    def over(self, key: str) -> bool:
        return time.monotonic() >= self._waiting.get(key, (0.0, 0.0))[1]

    def longer(self, key: str) -> None:
        """It has failed again."""
        before = self._waiting.get(key, (0.0, 0.0))[0]
        delay = min(2 * before or self._first, self._longest)
        self._waiting[key] = delay, time.monotonic() + delay

    def forget(self, key: str) -> None:
        self._waiting.pop(key, None)

    def keep(self, keys: Collection[str]) -> None:
        """Forget all others."""
        self._waiting = {key: self._waiting[key] for key in keys if key in self._waiting}
