"""A circuit breaker: after several failures in a row, calls fail at once until a probe succeeds.

closed      calls go through; MAX_FAILURES in a row, over all callers, open it
open        calls fail at once, for FIRST_OPEN_SECONDS, doubled by each failed probe up to MAX_OPEN_SECONDS
half-open   one call goes through as the probe; the others fail at once until it has ended

Knows no store; the caller says what a failure is. Thread-safe.
"""

import threading
import time
from collections.abc import Callable
from typing import Literal

from server.errors import StoreError

MAX_FAILURES = 5
FIRST_OPEN_SECONDS = 2.0
MAX_OPEN_SECONDS = 30.0

State = Literal["closed", "open", "half-open"]


class CircuitBreaker:
    def __init__(
        self, failures: int | None = MAX_FAILURES, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Opens after `failures` in a row; None: never."""
        self.times_opened = 0  # for metrics
        self._max_failures = failures
        self._clock = clock
        self._lock = threading.Lock()
        self._failures = 0
        self._open_seconds = FIRST_OPEN_SECONDS
        self._open_until: float | None = None  # by `clock`; None: closed
        self._probing = False

    @property
    def state(self) -> State:
        with self._lock:
            if self._open_until is None:
                return "closed"
            return "half-open" if self._probing or self._clock() >= self._open_until else "open"

    def enter(self) -> bool:
        """Call before each call; True: it is the probe. Raises StoreError while open. `leave` must follow."""
        with self._lock:
            if self._open_until is None:
                return False
            if self._probing or self._clock() < self._open_until:
                raise StoreError("The object store does not answer at present; try again in a moment.")
            self._probing = True
            return True

    def leave(self, probe: bool, succeeded: bool) -> bool:
        """Call after each call. True if it opens the breaker. Any success, even of an old call, closes it."""
        with self._lock:
            self._probing = self._probing and not probe
            if succeeded:
                self._failures, self._open_seconds, self._open_until = 0, FIRST_OPEN_SECONDS, None
                return False
            self._failures += 1
            if self._open_until is None:
                opens = self._max_failures is not None and self._failures >= self._max_failures
            else:
                opens = probe
                self._open_seconds = (
                    min(2 * self._open_seconds, MAX_OPEN_SECONDS) if probe else self._open_seconds
                )
            if opens:
                self._open_until = self._clock() + self._open_seconds
                self.times_opened += 1
            return opens
