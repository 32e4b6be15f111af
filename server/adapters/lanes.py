"""The threads that load. Most loads are made by patient ones, of low priority, so that the rows that run keep
their cores. A load that a place in the batch stands empty for is worth a core at once, if it is a small one.
"""

import contextlib
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from server.kernels.openmp import use_one_thread

THREADS = 2  # of each kind
NICENESS = 14
HAND_OVER_SECONDS = 0.0005  # Python's own 5 ms, at each of a step's launches, would be most of a step

Errand = Callable[[bool], None]  # told whether it is carried out hastily


class Lanes:
    """Used on any thread."""

    def __init__(self) -> None:
        self._waiting: dict[str, Errand] = {}  # by digest; nobody has begun with it
        self._lock = threading.Lock()
        self._patient = ThreadPoolExecutor(THREADS, "adapter-loader", initializer=_step_aside)
        self._hasty = ThreadPoolExecutor(THREADS, "adapter-hurry", initializer=use_one_thread)

    def submit(self, digest: str, errand: Errand) -> None:
        with self._lock:
            self._waiting[digest] = errand
        self._patient.submit(self._carry_out, digest)

    def hasten(self, digest: str) -> None:
        """Begin with it at once, if nobody has."""
        with self._lock:
            errand = self._waiting.pop(digest, None)
        if errand:
            self._hasty.submit(errand, True)

    def postpone(self, errand: Errand) -> None:
        """It turned out to be larger than what may be done hastily."""
        self._patient.submit(errand, False)

    def close(self) -> None:
        for pool in (self._patient, self._hasty):
            pool.shutdown(wait=False, cancel_futures=True)

    def _carry_out(self, digest: str) -> None:
        with self._lock:
            errand = self._waiting.pop(digest, None)
        if errand:
            errand(False)


def _step_aside() -> None:
    """This thread yields to the engine's: the interpreter soon, and the core if the system lets it."""
    use_one_thread()
    sys.setswitchinterval(HAND_OVER_SECONDS)
    with contextlib.suppress(OSError, AttributeError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
