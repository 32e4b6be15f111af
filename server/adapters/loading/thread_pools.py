"""The threads that load. Most loads are made by patient ones, of low priority, so that the rows that run keep
their cores. A load that a place in the batch stands empty for is worth a core at once, if it is a small one.
"""

import contextlib
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from server.kernels.cpu.openmp import use_one_thread

THREADS = 2  # of each kind
NICENESS = 14
HAND_OVER_SECONDS = 0.0005  # Python's own 5 ms, at each of a step's launches, would be most of a step

LoadTask = Callable[[bool], None]  # told whether it is carried out hastily


class LoadPools:
    """Used on any thread."""

    def __init__(self) -> None:
        self._waiting: dict[str, LoadTask] = {}  # by digest; nobody has begun with it
        self._hastened: set[str] = set()  # until that is done
        self._large: set[str] = set()  # not to be hastened again
        self._lock = threading.Lock()
        self._patient = ThreadPoolExecutor(THREADS, "adapter-loader", initializer=_step_aside)
        self._hasty = ThreadPoolExecutor(THREADS, "adapter-hurry", initializer=use_one_thread)

    def submit(self, digest: str, errand: LoadTask) -> None:
        """One at a time of a digest."""
        with self._lock:
            self._waiting[digest] = errand
        self._patient.submit(self._carry_out, digest, False)

    def hasten(self, digest: str) -> bool:
        """Let whoever is free begin with it; False if it goes on at its own pace, or is unknown."""
        with self._lock:
            if digest in self._hastened:
                return True
            if digest not in self._waiting or digest in self._large:
                return False
            self._hastened.add(digest)
        self._hasty.submit(self._carry_out, digest, True)
        return True

    def postpone(self, digest: str, errand: LoadTask) -> None:
        """Back to its place in line: it turned out to be larger than what may be done hastily."""
        with self._lock:
            self._large.add(digest)
        self.submit(digest, errand)

    def close(self) -> None:
        for pool in (self._patient, self._hasty):
            pool.shutdown(wait=False, cancel_futures=True)

    def _carry_out(self, digest: str, hastily: bool) -> None:
        """Of those who were sent for it, the first to come."""
        with self._lock:
            errand = self._waiting.pop(digest, None)
            if not hastily:
                self._large.discard(digest)
        if errand:
            errand(hastily)
        if hastily:
            with self._lock:
                self._hastened.discard(digest)


def _step_aside() -> None:
    """This thread yields to the engine's: the interpreter soon, and the core if the system lets it."""
    use_one_thread()
    sys.setswitchinterval(HAND_OVER_SECONDS)
    with contextlib.suppress(OSError, AttributeError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
