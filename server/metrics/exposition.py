"""What /metrics of the API shows: its own figures, the engine's, and those of the whole system.

The API's own are prometheus_client's objects; of several API processes, its multiprocess mode sums them. The
engine's come as `messages.Stats`, absolute, so every API process shows them all and none adds to them.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any, Literal

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Metric,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead

from server.build_info import build
from server.memory import resident_bytes
from server.messages import Stats
from server.metrics.metrics_file import write_figures_without_mapping
from server.metrics.names import API, ENGINE, FLEET, OPERATIONS, OTHER, SHARED, Family
from server.metrics.render import Counts, Values, merged, metrics_of, with_zeros

ENGINE_ID = "0"  # vLLM's label `engine`
PROCESS = "api"
OWN = {**API, **SHARED}


class Metrics:
    def __init__(self, model: str = "", folder: Path | None = None) -> None:
        """`folder`: where all API processes keep their figures (see `settings.multiprocess_dir`)."""
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = CollectorRegistry()
        self.registry.register(self)
        self.engine_up: Callable[[], bool] = lambda: self._stats is not None
        self.breaker: Callable[[], str] = lambda: "closed"  # the store's
        self.system: Values = {}  # of FLEET, as last read
        self._base = (model, ENGINE_ID)
        self._folder = folder
        self._stats: Stats | None = None
        self._own = CollectorRegistry()
        self._children: dict[tuple[str, ...], Any] = {}
        self._open = 0
        if folder is not None:
            write_figures_without_mapping()
            _bury_dead(folder)
        self._instruments = {key: _instrument(family, self._own) for key, family in OWN.items()}
        self._child("http_seconds", OTHER)
        for key, family in OWN.items():
            for labels in product(*family.labels.values()):  # a rate needs a beginning
                if "process" not in family.labels or labels[0] == PROCESS:
                    self._child(key, *labels)

    # what the API's rooms say

    def count(self, key: str, *labels: str) -> None:
        self._child(key, *labels).inc()

    def observe(self, key: str, value: float, *labels: str) -> None:
        self._child(key, *labels).observe(value)

    def opened(self, requests: int) -> None:
        """So many HTTP requests more, or fewer, are under way."""
        self._open += requests
        self._child("http_open").set(self._open)

    def on_valkey_call(self, seconds: float, failed: bool) -> None:
        self.observe("valkey_seconds", seconds)
        if failed:
            self.count("valkey_errors")

    def on_store_call(self, operation: str, seconds: float, outcome: str) -> None:
        """What `Objects.on_call` wants; from any thread."""
        operation = operation if operation in OPERATIONS else OTHER
        self.observe("store_seconds", seconds, PROCESS, operation)
        if outcome in ("failed", "refused"):
            self.count("store_errors", PROCESS, operation, outcome)

    def absorb(self, stats: Stats) -> None:
        """The engine's latest figures, about once a second."""
        self._stats = stats
        self._child("memory", PROCESS).set(resident_bytes())
        self._child("store_breaker", PROCESS).set(self.breaker() != "closed")

    # what Prometheus asks

    def render(self) -> bytes:
        """Prometheus text format 0.0.4. Takes milliseconds, on any thread."""
        return generate_latest(self.registry)

    def collect(self) -> Iterator[Metric]:
        return merged([*self._of_api(), *self._of_engine(), *self._of_system()])

    def describe(self) -> list[Metric]:
        """Nothing: what is not collected cannot clash."""
        return []

    def _of_api(self) -> Iterator[Metric]:
        if self._folder is None or not self._folder.is_dir():  # there was no room for one
            yield from self._own.collect()
        else:
            yield from MultiProcessCollector(None, str(self._folder)).collect()  # type: ignore[no-untyped-call]

    def _of_engine(self) -> Iterator[Metric]:
        up, values, counts = self.engine_up(), Values(), Counts()
        if stats := self._stats:
            given = [*stats.gauges.items(), *stats.counters.items()]
            for key, labels, value in [*((key, (), value) for key, value in given), *stats.series]:
                if key in _FROM_ENGINE and (up or _FROM_ENGINE[key].kind == "counter"):
                    values.setdefault(key, []).append((labels, value))
            for key, labels, buckets, total in stats.histograms:
                if key in _FROM_ENGINE:
                    counts.setdefault(key, []).append((labels, buckets, total))
        values, counts = with_zeros(_WITH_ZEROS, values, counts)
        yield from metrics_of(_FROM_ENGINE, self._base, values, counts)

    def _of_system(self) -> Iterator[Metric]:
        values: Values = {
            **self.system,
            "build_info": [(build(self._base[0]), 1.0)],
            "engine_up": [((), float(self.engine_up()))],
        }
        yield from metrics_of(FLEET, self._base, values)

    def _child(self, key: str, *labels: str) -> Any:
        found = self._children.get((key, *labels))
        if found is None:
            base = self._base if OWN[key].name.startswith("vllm:") else ()
            instrument, values = self._instruments[key], (*base, *labels)
            found = self._children[key, *labels] = instrument.labels(*values) if values else instrument
        return found


_FROM_ENGINE = {**ENGINE, **SHARED}
_WITH_ZEROS = {key: family for key, family in ENGINE.items() if key != "gpu_memory"}  # there may be no GPU


def _instrument(family: Family, registry: CollectorRegistry) -> Counter | Gauge | Histogram:
    labels = list(family.all_labels)
    if family.kind == "counter":
        return Counter(family.name, family.help, labels, registry=registry)
    if family.kind == "gauge":
        mode: Literal["livemax", "livesum"] = "livemax" if family.name.endswith("_open") else "livesum"
        return Gauge(family.name, family.help, labels, registry=registry, multiprocess_mode=mode)
    return Histogram(family.name, family.help, labels, registry=registry, buckets=family.buckets)


def _bury_dead(folder: Path) -> None:
    """Gauges of processes that are gone count no more; their counters do."""
    for path in folder.glob("gauge_live*_*.db"):
        pid = int(path.stem.rpartition("_")[2])
        if pid != os.getpid() and not _alive(pid):
            with contextlib.suppress(OSError):  # on a disk that is read-only they stay
                mark_process_dead(pid, str(folder))  # type: ignore[no-untyped-call]


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
