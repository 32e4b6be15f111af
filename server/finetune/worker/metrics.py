"""A worker's metrics: for its own /metrics, and as reports to Valkey for the API's (see jobs/stats.py).

A training process writes its counters to a file in its work folder, where the worker reads them.
"""

import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import msgspec
from prometheus_client import CollectorRegistry, Metric, start_http_server

from server.atomic_files import replace_file
from server.build_info import build
from server.errors import StartupError
from server.finetune.worker.store_calls import Calls, StoreCalls, merge_calls, metric_values, read_calls
from server.memory import resident_bytes
from server.metrics.labels import OUTCOMES
from server.metrics.names import FLEET, ON_WORKER, SHARED, WORKER
from server.metrics.render import Values, metrics_of

COUNTERS_FILE = "figures.json"  # in an attempt's work folder
COUNTER_OF_METRIC = {  # metric of server/metrics/names.py -> field of AttemptCounters
    "worker_tokens": "training_tokens",
    "worker_steps": "training_steps",
    "worker_checkpoints": "checkpoints",
    "worker_checkpoint_bytes": "checkpoint_bytes",
}


class AttemptCounters(msgspec.Struct):
    """What one attempt has trained so far."""

    training_tokens: int = 0
    training_steps: int = 0
    checkpoints: int = 0
    checkpoint_bytes: int = 0
    loss: float | None = None  # of the last update

    def write(self, folder: Path) -> None:
        """Write the counters where the worker of the process that works in `folder` reads them."""
        with suppress(OSError):  # a full disk: the training goes on, and the next step writes it all again
            replace_file(folder / COUNTERS_FILE, msgspec.json.encode(self), durable=False)


class WorkerMetrics:
    """One worker's metrics. Three threads use them: the one that runs jobs, the one that reports, and the
    HTTP server's; what they share is under the lock.
    """

    def __init__(self, model: str) -> None:
        self.counts: Counter[str] = Counter()  # of ended attempts
        self.outcomes: Counter[str] = Counter()  # ended attempts by outcome
        self.heartbeat_failures = 0
        self.loss: float | None = None  # of the last update
        self.store = StoreCalls()  # of the worker process itself
        self.last_heartbeat: float | None = None  # time.monotonic(); None: no job
        self._lock = threading.RLock()
        self._model = model
        self._folder: Path | None = None  # of the running attempt
        self._store_calls: Calls = {}  # of ended attempts
        self._reported: Counter[str] = Counter()

    @property
    def busy(self) -> bool:
        return self._folder is not None

    def begin(self, folder: Path) -> None:
        """An attempt starts, whose process works in `folder`."""
        self._folder, self.last_heartbeat = folder, time.monotonic()

    def end(self, outcome: str) -> None:
        """The attempt has ended, with one of OUTCOMES."""
        with self._lock:
            done = self.current()
            self.counts.update({key: getattr(done, key) for key in COUNTER_OF_METRIC.values()})
            self._store_calls = self._attempts_store_calls()
            self._folder = self.last_heartbeat = None
            self.outcomes[outcome] += 1

    def heartbeat(self, *, answered: bool) -> None:
        """A heartbeat was sent, and Valkey has answered or not."""
        if answered:
            self.last_heartbeat = time.monotonic()
        else:
            self.heartbeat_failures += 1

    def current(self) -> AttemptCounters:
        """The counters of the running attempt; all 0 without one."""
        with self._lock:
            if self._folder is None:
                return AttemptCounters()
            try:
                counters = msgspec.json.decode(
                    (self._folder / COUNTERS_FILE).read_bytes(), type=AttemptCounters
                )
            except FileNotFoundError:  # before its first step
                return AttemptCounters()
            self.loss = counters.loss
            return counters

    def _attempts_store_calls(self) -> Calls:
        """Store calls of all training processes of this worker."""
        with self._lock:
            return merge_calls(self._store_calls, read_calls(self._folder) if self._folder else {})

    def totals(self) -> Counter[str]:
        """The counters of all attempts, the running one included."""
        with self._lock:
            done = self.current()
            return self.counts + Counter({key: getattr(done, key) for key in COUNTER_OF_METRIC.values()})

    def unreported(self) -> dict[str, int]:
        """Increments since the last report; pass them to `mark_reported` once they are reported."""
        with self._lock:
            ended = Counter({f"attempts:{how}": n for how, n in self.outcomes.items()})
            return dict(self.totals() + ended - self._reported)

    def mark_reported(self, increments: dict[str, int]) -> None:
        self._reported.update(increments)

    def collect(self) -> Iterator[Metric]:
        """prometheus_client's interface of a collector."""
        totals, loss, last_heartbeat = self.totals(), self.loss, self.last_heartbeat
        values: Values = {key: [((), totals[name])] for key, name in COUNTER_OF_METRIC.items()}
        values |= {
            "worker_busy": [((), self.busy)],
            "worker_attempts": [((how,), self.outcomes[how]) for how in OUTCOMES],
            "worker_silence": [((), 0.0 if last_heartbeat is None else time.monotonic() - last_heartbeat)],
            "worker_beat_failures": [((), self.heartbeat_failures)],
            "memory": [(("worker",), resident_bytes())],
            "build_info": [(build(self._model), 1)],
        }
        if loss is not None:
            values["worker_loss"] = [((), loss)]
        errors, seconds = metric_values(merge_calls(self._attempts_store_calls(), self.store.calls()))
        families = {key: family for key, family in {**WORKER, **SHARED, **FLEET}.items() if key in ON_WORKER}
        yield from metrics_of(families, (), values | errors, seconds)

    def serve(self, host: str, port: int) -> None:
        """Serve /metrics on a thread of its own until the process ends. Raises StartupError."""
        registry = CollectorRegistry()
        registry.register(self)
        try:
            start_http_server(port, host, registry)
        except OSError as error:
            raise StartupError(f"metrics_port {port} cannot be listened on: {error.strerror}.") from error
