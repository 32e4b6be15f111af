"""/metrics of the API: the metrics of the API processes, of the engine and of the whole system.

The API's are prometheus_client's objects, which its multiprocess mode sums over the API processes. The engine
sends its own as absolute values (`messages.Stats`), so each API process shows them unchanged.
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
from server.metrics.engine_names import ENGINE
from server.metrics.family import Family
from server.metrics.labels import OTHER, operation_label
from server.metrics.metrics_file import write_metrics_without_mapping
from server.metrics.names import API, FLEET, SHARED
from server.metrics.render import Counts, Values, merged, metrics_of, with_zeros

ENGINE_ID = "0"  # vLLM's label `engine`
PROCESS = "api"
API_FAMILIES = {**API, **SHARED}


class Metrics:
    def __init__(self, model: str = "", folder: Path | None = None) -> None:
        """`folder` holds the metrics files of all API processes (see `settings.multiprocess_dir`)."""
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = CollectorRegistry()
        self.registry.register(self)
        self.engine_up: Callable[[], bool] = lambda: self._stats is not None
        self.breaker: Callable[[], str] = lambda: "closed"  # state of the store's circuit breaker
        self.system: Values = {}  # of FLEET, as last read by ClusterMetrics
        self._model_labels = (model, ENGINE_ID)
        self._multiprocess_dir = folder
        self._stats: Stats | None = None
        self._api_registry = CollectorRegistry()
        self._children: dict[tuple[str, ...], Any] = {}
        self._open_requests = 0
        if folder is not None:
            write_metrics_without_mapping()
            _drop_gauges_of_dead(folder)
        self._instruments = {
            key: _instrument(family, self._api_registry) for key, family in API_FAMILIES.items()
        }
        self._child("http_seconds", OTHER)
        for key, family in API_FAMILIES.items():
            for labels in product(*family.labels.values()):  # a rate needs a first value
                if "process" not in family.labels or labels[0] == PROCESS:
                    self._child(key, *labels)

    # recorded by the API

    def count(self, key: str, *labels: str) -> None:
        self._child(key, *labels).inc()

    def observe(self, key: str, value: float, *labels: str) -> None:
        self._child(key, *labels).observe(value)

    def opened(self, requests: int) -> None:
        """Add `requests` (-1: one has ended) to the number of open HTTP requests."""
        self._open_requests += requests
        self._child("http_open").set(self._open_requests)

    def on_ledger(self, lag_seconds: float, pending: int, lost: int) -> None:
        """Callback for `Ledger`, once a second; `lost` since the last time."""
        self._child("ledger_lag").set(lag_seconds)
        self._child("ledger_pending").set(pending)
        self._child("ledger_lost").inc(lost)

    def on_valkey_call(self, seconds: float, failed: bool) -> None:
        """Callback for `InstrumentedRedis.on_call`."""
        self.observe("valkey_seconds", seconds)
        if failed:
            self.count("valkey_errors")

    def on_store_call(self, operation: str, seconds: float, outcome: str) -> None:
        """Callback for `Objects.on_call`; thread-safe."""
        operation = operation_label(operation)
        self.observe("store_seconds", seconds, PROCESS, operation)
        if outcome in ("failed", "refused"):
            self.count("store_errors", PROCESS, operation, outcome)

    def absorb(self, stats: Stats) -> None:
        """Take over the engine's latest metrics; called about once a second."""
        self._stats = stats
        self._child("memory", PROCESS).set(resident_bytes())
        self._child("store_breaker", PROCESS).set(self.breaker() != "closed")

    # read by Prometheus

    def render(self) -> bytes:
        """Prometheus text format 0.0.4. Takes milliseconds; thread-safe."""
        return generate_latest(self.registry)

    def collect(self) -> Iterator[Metric]:
        """Called by the registry that `render` reads."""
        return merged([*self._of_api(), *self._of_engine(), *self._of_system()])

    def describe(self) -> list[Metric]:
        """Nothing, so that the registry does not check for name clashes."""
        return []

    def _of_api(self) -> Iterator[Metric]:
        if self._multiprocess_dir is None or not self._multiprocess_dir.is_dir():  # the disk was full
            yield from self._api_registry.collect()
        else:
            yield from MultiProcessCollector(None, str(self._multiprocess_dir)).collect()  # type: ignore[no-untyped-call]

    def _of_engine(self) -> Iterator[Metric]:
        up, values, counts = self.engine_up(), Values(), Counts()
        if stats := self._stats:
            unlabelled = [*stats.gauges.items(), *stats.counters.items()]
            for key, labels, value in [*((key, (), value) for key, value in unlabelled), *stats.series]:
                if key in _ENGINE_FAMILIES and (up or _ENGINE_FAMILIES[key].kind == "counter"):
                    values.setdefault(key, []).append((labels, value))
            for key, labels, buckets, total in stats.histograms:
                if key in _ENGINE_FAMILIES:
                    counts.setdefault(key, []).append((labels, buckets, total))
        values, counts = with_zeros(_ZERO_FAMILIES, values, counts)
        yield from metrics_of(_ENGINE_FAMILIES, self._model_labels, values, counts)

    def _of_system(self) -> Iterator[Metric]:
        values: Values = {
            **self.system,
            "build_info": [(build(self._model_labels[0]), 1.0)],
            "engine_up": [((), float(self.engine_up()))],
        }
        yield from metrics_of(FLEET, self._model_labels, values)

    def _child(self, key: str, *labels: str) -> Any:
        found = self._children.get((key, *labels))
        if found is None:
            base = self._model_labels if API_FAMILIES[key].name.startswith("vllm:") else ()
            instrument, values = self._instruments[key], (*base, *labels)
            found = self._children[key, *labels] = instrument.labels(*values) if values else instrument
        return found


_ENGINE_FAMILIES = {**ENGINE, **SHARED}
_ZERO_FAMILIES = {
    key: family for key, family in ENGINE.items() if key != "gpu_memory"
}  # a machine without a GPU has no series


def _instrument(family: Family, registry: CollectorRegistry) -> Counter | Gauge | Histogram:
    labels = list(family.all_labels)
    if family.kind == "counter":
        return Counter(family.name, family.help, labels, registry=registry)
    if family.kind == "gauge":
        largest = family.name.endswith(("_open", "_lag_seconds"))
        mode: Literal["livemax", "livesum"] = "livemax" if largest else "livesum"
        return Gauge(family.name, family.help, labels, registry=registry, multiprocess_mode=mode)
    return Histogram(family.name, family.help, labels, registry=registry, buckets=family.buckets)


def _drop_gauges_of_dead(folder: Path) -> None:
    """Remove the gauges of dead processes; their counters stay in the sums."""
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
