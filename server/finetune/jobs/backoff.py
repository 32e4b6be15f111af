"""Exponential back-off by key: when something that failed is due again. No I/O."""

import time
from collections.abc import Collection


class Backoff:
    """The delays of any number of keys. Unknown keys are due."""

    def __init__(self, first_seconds: float, max_seconds: float) -> None:
        """The delay after a key's first failure, which doubles with each further one, and its limit."""
        self._first_seconds = first_seconds
        self._max_seconds = max_seconds
        self._delays: dict[str, tuple[float, float]] = {}  # key -> delay, and its end by time.monotonic()

    def is_due(self, key: str) -> bool:
        return time.monotonic() >= self._delays.get(key, (0.0, 0.0))[1]

    def failed(self, key: str) -> None:
        """Start the next, longer delay."""
        last = self._delays.get(key, (0.0, 0.0))[0]
        delay = min(2 * last or self._first_seconds, self._max_seconds)
        self._delays[key] = delay, time.monotonic() + delay

    def forget(self, key: str) -> None:
        self._delays.pop(key, None)

    def keep_only(self, keys: Collection[str]) -> None:
        """Forget all other keys."""
        self._delays = {key: self._delays[key] for key in keys if key in self._delays}
