"""Counts of object store calls by a worker and its training processes, for the worker's own /metrics.

The counts are one flat table: `get:3` is the number of calls in bucket 3 of the histogram, `get:seconds`
their total time, `get:failed` the number of failures. A training process writes its table to a file in its
work folder, where the worker reads it.
"""

from bisect import bisect_left
from collections import defaultdict
from contextlib import suppress
from itertools import product
from pathlib import Path
from threading import Lock

import msgspec

from server.atomic_files import replace_file
from server.metrics.labels import OPERATIONS, operation_label
from server.metrics.names import SHARED
from server.metrics.render import Counts, Values

CALLS_FILE = "store.json"  # in an attempt's work folder
PROCESS = "worker"
BUCKETS = SHARED["store_seconds"].buckets
OUTCOMES = SHARED["store_errors"].labels["outcome"]

Calls = dict[str, float]


class StoreCalls:
    """The calls of one process. Thread-safe."""

    def __init__(self, folder: Path | None = None) -> None:
        """With `folder`, each call rewrites CALLS_FILE there."""
        self._folder = folder
        self._calls: Calls = {}
        self._lock = Lock()

    def on_call(self, operation: str, seconds: float, outcome: str) -> None:
        """Count one call; assign it to `Objects.on_call`."""
        operation = operation_label(operation)
        call = {f"{operation}:{bisect_left(BUCKETS, seconds)}": 1.0, f"{operation}:seconds": seconds}
        if outcome in OUTCOMES:
            call[f"{operation}:{outcome}"] = 1.0
        with self._lock:
            self._calls = merge_calls(self._calls, call)
            if self._folder is not None:
                with suppress(OSError):  # a full disk: the call has been made all the same
                    replace_file(self._folder / CALLS_FILE, msgspec.json.encode(self._calls), durable=False)

    def calls(self) -> Calls:
        with self._lock:
            return self._calls


def read_calls(folder: Path) -> Calls:
    """The table of the training process that works in `folder`."""
    try:
        return msgspec.json.decode((folder / CALLS_FILE).read_bytes(), type=Calls)
    except FileNotFoundError:  # it has made no call yet
        return {}


def merge_calls(*tables: Calls) -> Calls:
    """The sums of several tables."""
    total: defaultdict[str, float] = defaultdict(float)
    for table in tables:
        for key, amount in table.items():
            total[key] += amount
    return dict(total)


def metric_values(calls: Calls) -> tuple[Values, Counts]:
    """Counters and histograms of every operation, also unused ones: a rate needs a first sample of 0."""
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
                [int(calls.get(f"{operation}:{bucket}", 0)) for bucket in range(len(BUCKETS) + 1)],
                calls.get(f"{operation}:seconds", 0.0),
            )
            for operation in OPERATIONS
        ]
    }
    return values, counts
