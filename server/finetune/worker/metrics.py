"""What a worker has done, for its own /metrics and for everybody's (see `figures`).

The process that trains leaves its figures in a file of its work folder; the worker reads them there.
"""

import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import msgspec
from prometheus_client import CollectorRegistry, Metric, start_http_server

from server.build_info import build
from server.errors import StartupError
from server.finetune.worker.store_calls import Calls, StoreCalls, added, read, shown
from server.memory import resident_bytes
from server.metrics.names import FLEET, ON_WORKER, OUTCOMES, SHARED, WORKER
from server.metrics.render import Values, metrics_of

FILE = "figures.json"  # in an attempt's work folder
SHOWN = {
    "worker_tokens": "training_tokens",
    "worker_steps": "training_steps",
    "worker_checkpoints": "checkpoints",
    "worker_checkpoint_bytes": "checkpoint_bytes",
}


class AttemptCounters(msgspec.Struct):
    """What one attempt has done so far."""

    training_tokens: int = 0
    training_steps: int = 0
    checkpoints: int = 0
    checkpoint_bytes: int = 0
    loss: float | None = None

    def write(self, folder: Path) -> None:
        draft = folder / f".{FILE}"
        with suppress(OSError):  # a full disk: the training goes on, and the next step writes it all again
            draft.write_bytes(msgspec.json.encode(self))
            draft.replace(folder / FILE)


class WorkerMetrics:
    """A worker's. One thread works, one sweeps and tells, one shows; what they share is under the lock."""

    def __init__(self, model: str) -> None:
        self.counts: Counter[str] = Counter()  # of attempts that are over
        self.outcomes: Counter[str] = Counter()
        self.beat_failures = 0
        self.loss: float | None = None  # of the last update
        self.store = StoreCalls()  # the worker's own
        self.heard: float | None = None  # time.monotonic() of the job's last heartbeat; None: no job
        self._lock = threading.RLock()
        self._model = model
        self._folder: Path | None = None
        self._stored: Calls = {}  # by attempts that are over
        self._told: Counter[str] = Counter()

    @property
    def busy(self) -> bool:
        return self._folder is not None

    def begin(self, folder: Path) -> None:
        """An attempt whose process works in `folder`."""
        self._folder, self.heard = folder, time.monotonic()

    def end(self, outcome: str) -> None:
        with self._lock:
            done = self.trained()
            self.counts.update({key: getattr(done, key) for key in SHOWN.values()})
            self._stored = self._of_attempts()
            self._folder = self.heard = None
            self.outcomes[outcome] += 1

    def beat(self, *, heard: bool) -> None:
        if heard:
            self.heard = time.monotonic()
        else:
            self.beat_failures += 1

    def trained(self) -> AttemptCounters:
        """By the attempt under way."""
        with self._lock:
            if self._folder is None:
                return AttemptCounters()
            try:
                found = msgspec.json.decode((self._folder / FILE).read_bytes(), type=AttemptCounters)
            except FileNotFoundError:  # its first step is still to come
                return AttemptCounters()
            self.loss = found.loss
            return found

    def _of_attempts(self) -> Calls:
        """Calls of the store by all processes that trained."""
        with self._lock:
            return added(self._stored, read(self._folder) if self._folder else {})

    def totals(self) -> Counter[str]:
        """All this worker has done."""
        with self._lock:
            done = self.trained()
            return self.counts + Counter({key: getattr(done, key) for key in SHOWN.values()})

    def news(self) -> dict[str, int]:
        """What has been counted and not told; `told` it once it has been."""
        with self._lock:
            ended = Counter({f"attempts:{how}": n for how, n in self.outcomes.items()})
            return dict(self.totals() + ended - self._told)

    def told(self, news: dict[str, int]) -> None:
        self._told.update(news)

    def collect(self) -> Iterator[Metric]:
        """For prometheus_client."""
        totals, loss, heard = self.totals(), self.loss, self.heard
        values: Values = {key: [((), totals[name])] for key, name in SHOWN.items()}
        values |= {
            "worker_busy": [((), self.busy)],
            "worker_attempts": [((how,), self.outcomes[how]) for how in OUTCOMES],
            "worker_silence": [((), 0.0 if heard is None else time.monotonic() - heard)],
            "worker_beat_failures": [((), self.beat_failures)],
            "memory": [(("worker",), resident_bytes())],
            "build_info": [(build(self._model), 1)],
        }
        if loss is not None:
            values["worker_loss"] = [((), loss)]
        errors, seconds = shown(added(self._of_attempts(), self.store.calls()))
        families = {key: family for key, family in {**WORKER, **SHARED, **FLEET}.items() if key in ON_WORKER}
        yield from metrics_of(families, (), values | errors, seconds)

    def serve(self, host: str, port: int) -> None:
        """Show it on a thread of its own, for as long as the process lives. Raises StartupError."""
        registry = CollectorRegistry()
        registry.register(self)
        try:
            start_http_server(port, host, registry)
        except OSError as error:
            raise StartupError(f"metrics_port {port} cannot be listened on: {error.strerror}.") from error
