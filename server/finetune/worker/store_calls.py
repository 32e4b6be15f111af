"""Calls of the object store by a worker and the processes that train for it, for the worker's own /metrics.

One flat table: `get:3` are calls that fell in bucket 3, `get:seconds` is what all took, `get:failed` how many
failed. The process that trains leaves its table in a file of its work folder; the worker reads it there.
"""

from bisect import bisect_left
from collections import defaultdict
from contextlib import suppress
from itertools import product
from pathlib import Path
from threading import Lock

import msgspec

from server.metrics.names import OPERATIONS, OTHER, SHARED
from server.metrics.render import Counts, Values

FILE = "store.json"  # in an attempt's work folder
PROCESS = "worker"
BUCKETS = SHARED["store_seconds"].buckets
OUTCOMES = SHARED["store_errors"].labels["outcome"]

Calls = dict[str, float]


class StoreCalls:
    """What one process has called."""

    def __init__(self, folder: Path | None = None) -> None:
        """`folder`: where others may read it."""
        self._folder = folder
        self._calls: Calls = {}
        self._lock = Lock()

    def on_call(self, operation: str, seconds: float, outcome: str) -> None:
        """What `Objects.on_call` wants; from any thread."""
        operation = operation if operation in OPERATIONS else OTHER
        news = {f"{operation}:{bisect_left(BUCKETS, seconds)}": 1.0, f"{operation}:seconds": seconds}
        if outcome in OUTCOMES:
            news[f"{operation}:{outcome}"] = 1.0
        with self._lock:
            self._calls = added(self._calls, news)
            if self._folder is not None:
                with suppress(OSError):  # a full disk: the call has been made all the same
                    self._write(self._folder)

    def calls(self) -> Calls:
        with self._lock:
            return self._calls

    def _write(self, folder: Path) -> None:
        draft = folder / f".{FILE}"
        draft.write_bytes(msgspec.json.encode(self._calls))
        draft.replace(folder / FILE)


def read(folder: Path) -> Calls:
    """Of the process that works there."""
    try:
        return msgspec.json.decode((folder / FILE).read_bytes(), type=Calls)
    except FileNotFoundError:  # it has called nothing yet
        return {}


def added(*calls: Calls) -> Calls:
    total: defaultdict[str, float] = defaultdict(float)
    for some in calls:
        for key, amount in some.items():
            total[key] += amount
    return dict(total)


def shown(calls: Calls) -> tuple[Values, Counts]:
    """Every operation, also those that nobody has called: a rate needs a beginning."""
    values: Values = {
        "store_errors": [
            ((PROCESS, operation, outcome), calls.get(f"{operation}:{outcome}", 0.0))
            for operation, outcome in product(OPERATIONS, OUTCOMES)
        ]
    }
    counts: Counts = {
        "store_seconds": [
            (
                (PROCESS, operation),
                [int(calls.get(f"{operation}:{at}", 0)) for at in range(len(BUCKETS) + 1)],
                calls.get(f"{operation}:seconds", 0.0),
            )
            for operation in OPERATIONS
        ]
    }
    return values, counts
