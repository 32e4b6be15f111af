"""The threads on which adapters are loaded, in two pools.

Loads start in the background pool, whose threads have low priority, so that running rows keep their cores. A
load that a free row of the batch waits for is made urgent: it runs at normal priority, if it is small.
"""

import contextlib
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from server.kernels.cpu.openmp import use_one_thread

THREADS = 2  # of each pool
NICENESS = 14
SWITCH_SECONDS = 0.0005  # Python's own 5 ms, at each of a step's launches, would be most of a step

LoadTask = Callable[[bool], None]  # its argument: whether it runs as an urgent one


class LoadPools:
    """Used on any thread."""

    def __init__(self) -> None:
        self._queued: dict[str, LoadTask] = {}  # by digest; not begun yet
        self._urgent_digests: set[str] = set()  # until their urgent task has ended
        self._large: set[str] = set()  # not to be made urgent again
        self._lock = threading.Lock()
        self._background = ThreadPoolExecutor(THREADS, "adapter-load", initializer=_lower_priority)
        self._urgent = ThreadPoolExecutor(THREADS, "adapter-load-urgent", initializer=use_one_thread)

    def submit(self, digest: str, task: LoadTask) -> None:
        """Queue a load in the background. At most one of a digest at a time."""
        with self._lock:
            self._queued[digest] = task
        self._background.submit(self._run, digest, False)

    def prioritise(self, digest: str) -> bool:
        """Make a queued load urgent. False if it is running in the background, large, or unknown."""
        with self._lock:
            if digest in self._urgent_digests:
                return True
            if digest not in self._queued or digest in self._large:
                return False
            self._urgent_digests.add(digest)
        self._urgent.submit(self._run, digest, True)
        return True

    def postpone(self, digest: str, task: LoadTask) -> None:
        """Queue an urgent load in the background again: it turned out to be too large for an urgent one."""
        with self._lock:
            self._large.add(digest)
        self.submit(digest, task)

    def close(self) -> None:
        for pool in (self._background, self._urgent):
            pool.shutdown(wait=False, cancel_futures=True)

    def _run(self, digest: str, urgent: bool) -> None:
        """Both pools may have been given the digest: the first thread to come runs the task."""
        with self._lock:
            task = self._queued.pop(digest, None)
            if not urgent:
                self._large.discard(digest)
        if task:
            task(urgent)
        if urgent:
            with self._lock:
                self._urgent_digests.discard(digest)


def _lower_priority() -> None:
    """This thread soon yields the interpreter to the engine's, and its core where the system allows it."""
    use_one_thread()
    sys.setswitchinterval(SWITCH_SECONDS)
    with contextlib.suppress(OSError, AttributeError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
