"""What a worker has done, for its own /metrics and for everybody's (see `figures`).

The process that trains leaves its figures in a file of its work folder; the worker reads them there.
"""

import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import msgspec
from prometheus_client import CollectorRegistry, Metric, start_http_server

from server.build import build
from server.errors import StartupError
from server.memory import resident_bytes
from server.metrics.names import FLEET, ON_WORKER, OUTCOMES, SHARED, WORKER
from server.metrics.render import Values, metrics_of, with_zeros

FILE = "figures.json"  # in an attempt's work folder
SHOWN = {
    "worker_tokens": "training_tokens",
    "worker_steps": "training_steps",
    "worker_checkpoints": "checkpoints",
    "worker_checkpoint_bytes": "checkpoint_bytes",
}


class Trained(msgspec.Struct):
    """What one attempt has done so far."""

    training_tokens: int = 0
    training_steps: int = 0
    checkpoints: int = 0
    checkpoint_bytes: int = 0
    loss: float | None = None

    def write(self, folder: Path) -> None:
        draft = folder / f".{FILE}"
        draft.write_bytes(msgspec.json.encode(self))
        draft.replace(folder / FILE)


class Tally:
    """A worker's. Everything but `collect` happens on the thread that works or on the one that sweeps."""

    def __init__(self, model: str) -> None:
        self.counts: Counter[str] = Counter()  # of attempts that are over
        self.outcomes: Counter[str] = Counter()
        self.beat_failures = 0
        self.loss: float | None = None  # of the last update
        self.heard: float | None = None  # time.monotonic() of the job's last heartbeat; None: no job
        self._model = model
        self._folder: Path | None = None
        self._told: Counter[str] = Counter()

    @property
    def busy(self) -> bool:
        return self._folder is not None

    def begin(self, folder: Path) -> None:
        """An attempt whose process works in `folder`."""
        self._folder, self.heard = folder, time.monotonic()

    def end(self, outcome: str) -> None:
        done = self.trained()
        self.counts.update({key: getattr(done, key) for key in SHOWN.values()})
        self._folder = self.heard = None
        self.outcomes[outcome] += 1

    def beat(self, *, heard: bool) -> None:
        if heard:
            self.heard = time.monotonic()
        else:
            self.beat_failures += 1

    def trained(self) -> Trained:
        """By the attempt under way."""
        if self._folder is None:
            return Trained()
        try:
            found = msgspec.json.decode((self._folder / FILE).read_bytes(), type=Trained)
        except FileNotFoundError:  # its first step is still to come
            return Trained()
        self.loss = found.loss
        return found

    def totals(self) -> Counter[str]:
        """All this worker has done."""
        done = self.trained()
        return self.counts + Counter({key: getattr(done, key) for key in SHOWN.values()})

    def news(self) -> dict[str, int]:
        """What has been counted and not told; `told` it once it has been."""
        all_of_it = self.totals() + Counter({f"attempts:{how}": n for how, n in self.outcomes.items()})
        return dict(all_of_it - self._told)

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
        families = {key: family for key, family in {**WORKER, **SHARED, **FLEET}.items() if key in ON_WORKER}
        yield from metrics_of(families, (), with_zeros({}, values, {})[0])

    def serve(self, host: str, port: int) -> None:
        """Show it on a thread of its own, for as long as the process lives. Raises StartupError."""
        registry = CollectorRegistry()
        registry.register(self)
        try:
            start_http_server(port, host, registry)
        except OSError as error:
            raise StartupError(f"metrics_port {port} cannot be listened on: {error.strerror}.") from error
