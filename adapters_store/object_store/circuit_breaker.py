"""A circuit breaker: after a row of failures callers are told at once, until one of them gets through.

closed      calls go through; FAILURES in a row, whoever made them, open it
open        calls fail at once, for SECONDS, twice as long after each probe that failed, up to MAX_SECONDS
half-open   one call goes through as the probe; the others fail at once until it has ended

Knows neither stores nor what a failure is. Safe to use from several threads.
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
        """`failures` None: it never opens."""
        self.opened = 0  # times, for figures
        self._failures = failures
        self._clock = clock
        self._lock = threading.Lock()
        self._in_a_row = 0
        self._wait = FIRST_OPEN_SECONDS
        self._until: float | None = None  # open until then; None: closed
        self._probing = False

    @property
    def state(self) -> State:
        with self._lock:
            if self._until is None:
                return "closed"
            return "half-open" if self._probing or self._clock() >= self._until else "open"

    def enter(self) -> bool:
        """Before a call, which must end in `leave`; whether it is the probe. Raises StoreError while open."""
        with self._lock:
            if self._until is None:
                return False
            if self._probing or self._clock() < self._until:
                raise StoreError("The object store does not answer at present; try again in a moment.")
            self._probing = True
            return True

    def leave(self, probe: bool, worked: bool) -> bool:
        """After it; whether this opened the breaker. Any call that worked, however old, closes it."""
        with self._lock:
            self._probing = self._probing and not probe
            if worked:
                self._in_a_row, self._wait, self._until = 0, FIRST_OPEN_SECONDS, None
                return False
            self._in_a_row += 1
            if self._until is None:
                opens = self._failures is not None and self._in_a_row >= self._failures
            else:
                opens = probe
                self._wait = min(2 * self._wait, MAX_OPEN_SECONDS) if probe else self._wait
            if opens:
                self._until = self._clock() + self._wait
                self.opened += 1
            return opens
