"""Slow is not dead: what tells a long step from one that hangs, by a thread that does not compute.

The thread that computes counts its turns and says what the step under way should take. A thread beside it
tells everybody who listens, once in BEAT_SECONDS, how long the turn under way has run and what its bound is;
past the bound it ends the process, which `serve` then starts again.

The age of a turn is counted in beats. Whatever stops the whole process (SIGSTOP, swap, a starved machine)
stops the beats as well, so that time is no part of any step. An engine that is silent altogether is the
supervisor's to judge.
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
# A bound is MULTIPLE of what steps of as many tokens took before: on a machine with 30 processes a core a
# step takes 30 times as long. It is never below FLOOR_SECONDS: a step that compiles kernels or records a
# graph takes minutes, and a false alarm ends everybody's rows, a late one only those that hang already.
MULTIPLE = 30.0
FLOOR_SECONDS = 300.0
REMEMBERED_STEPS = 16  # about so many steps of one size make its mean
EXIT_STATUS = 70  # EX_SOFTWARE

log = logging.getLogger(__name__)


class StepClock:
    """What the thread that computes says of itself; any thread may read it."""

    def __init__(self) -> None:
        self.iteration = 0  # of the engine's loop
        self.bound = FLOOR_SECONDS  # of the turn under way
        self._means: dict[int, float] = {}  # seconds of a step, by the bits of its number of tokens

    def next_iteration(self) -> None:
        self.iteration += 1
        self.bound = FLOOR_SECONDS

    def begin(self, tokens: int) -> None:
        """This turn's step has so many tokens."""
        self.bound = max(FLOOR_SECONDS, MULTIPLE * self._expected(tokens.bit_length()))

    def end(self, tokens: int, seconds: float) -> None:
        """A step of so many tokens took so long."""
        bits = tokens.bit_length()
        mean = self._means.get(bits, seconds)
        self._means[bits] = mean + (seconds - mean) / REMEMBERED_STEPS

    def _expected(self, bits: int) -> float:
        """By steps of that size; else by the next smaller ones, each token as dear; else by larger ones."""
        smaller = max((size for size in self._means if size <= bits), default=None)
        if smaller is not None:
            return self._means[smaller] * 2.0 ** (bits - smaller)
        return min(self._means.values(), default=0.0)


class Watchdog:
    """Call `start` from the thread that computes, once it takes its turns."""

    def __init__(self, clock: StepClock, boot: str, address: str) -> None:
        """`address`: the engine's; beats are published beside it."""
        self._clock = clock
        self._boot = boot
        self._address = address
        self._computing = 0  # the thread that is watched

    def start(self) -> None:
        self._computing = threading.get_ident()
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def _watch(self) -> None:
        # this thread's own: sockets are not to be shared
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
        """End the process; those who listen have heard why by then."""
        stack = traceback.format_stack(sys._current_frames()[self._computing])  # noqa: SLF001 - no other way
        log.critical(
            "A step has run for %.0f s and its bound is %.0f s: the engine hangs and ends. It is at:\n%s",
            age,
            bound,
            "".join(stack),
        )
        time.sleep(BEAT_SECONDS)
        os._exit(EXIT_STATUS)
