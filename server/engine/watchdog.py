"""Heartbeats and hang detection: a second thread distinguishes a long step from one that hangs.

The computing thread counts the iterations of its loop and sets a bound for the current step. The watchdog
thread publishes, every BEAT_SECONDS, the age and the bound of the current iteration. Past the bound it ends
the process, which `polypeft serve` then restarts.

The age of an iteration is counted in beats. Anything that stops the whole process (SIGSTOP, swap, a starved
machine) stops the beats too, so that time is not part of any step. An engine without beats is a matter for
the supervisor.
"""

import logging
import os
import sys
import threading
import time
import traceback

import zmq

from server.messages import Beat, beat_address, encode

BEAT_SECONDS = 1.0
# The bound of a step is MULTIPLE times what earlier steps of as many tokens took: on a machine with 30
# processes a core a step takes 30 times as long. It is at least FLOOR_SECONDS: a step that compiles kernels
# or records a graph takes minutes. A false alarm ends all rows, a late one only rows that hang already.
MULTIPLE = 30.0
FLOOR_SECONDS = 300.0
AVERAGED_STEPS = 16  # the time of a step size is a moving average over about so many steps
EXIT_STATUS = 70  # EX_SOFTWARE

log = logging.getLogger(__name__)


class StepClock:
    """Progress of the computing thread, which alone writes it; any thread may read it."""

    def __init__(self) -> None:
        self.iteration = 0  # of the engine's loop
        self.bound = FLOOR_SECONDS  # seconds that the current iteration may take
        self._means: dict[int, float] = {}  # seconds of a step by the bit length of its number of tokens

    def next_iteration(self) -> None:
        self.iteration += 1
        self.bound = FLOOR_SECONDS

    def begin(self, tokens: int) -> None:
        """Set the bound for a step of `tokens` tokens."""
        self.bound = max(FLOOR_SECONDS, MULTIPLE * self._expected(tokens.bit_length()))

    def end(self, tokens: int, seconds: float) -> None:
        """Record the time of a step of `tokens` tokens."""
        bits = tokens.bit_length()
        mean = self._means.get(bits, seconds)
        self._means[bits] = mean + (seconds - mean) / AVERAGED_STEPS

    def _expected(self, bits: int) -> float:
        """Seconds by steps of that size, else scaled up from the next smaller size, else by larger ones."""
        smaller = max((size for size in self._means if size <= bits), default=None)
        if smaller is not None:
            return self._means[smaller] * 2.0 ** (bits - smaller)
        return min(self._means.values(), default=0.0)


class Watchdog:
    """Publishes beats and ends a process that hangs. Call `start` from the computing thread."""

    def __init__(self, clock: StepClock, boot: str, address: str) -> None:
        """`address` is the engine's socket; beats are published at `beat_address(address)`."""
        self._clock = clock
        self._boot = boot
        self._address = address
        self._computing = 0  # id of the computing thread

    def start(self) -> None:
        self._computing = threading.get_ident()
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def _watch(self) -> None:
        # a ZeroMQ socket may not be shared between threads
        socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.PUB)
        socket.setsockopt(zmq.LINGER, 0)
        socket.bind(beat_address(self._address))
        iteration, age, before = self._clock.iteration, 0.0, time.monotonic()
        while True:
            time.sleep(BEAT_SECONDS)
            now = time.monotonic()
            age += min(now - before, 2 * BEAT_SECONDS)
            before = now
            if self._clock.iteration != iteration:
                iteration, age = self._clock.iteration, 0.0
            bound = self._clock.bound
            socket.send(encode(Beat(self._boot, age, bound)))
            if age > bound:
                self._end(age, bound)

    def _end(self, age: float, bound: float) -> None:
        """Log the stack of the computing thread and end the process; the last beat has told clients why."""
        stack = traceback.format_stack(sys._current_frames()[self._computing])  # noqa: SLF001 - no other way
        log.critical(
            "A step has run for %.0f s and its bound is %.0f s: the engine hangs and ends. It is at:\n%s",
            age,
            bound,
            "".join(stack),
        )
        time.sleep(BEAT_SECONDS)
        os._exit(EXIT_STATUS)
