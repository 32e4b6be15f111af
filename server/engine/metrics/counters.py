"""The engine's counters and histograms for /metrics, in dictionaries; no Prometheus.

Values are absolute and survive the process: each report is written to disk before it is sent, if the disk has
space, and the next engine process continues from there. Keys are those of server/metrics/names.py.
"""

import logging
from bisect import bisect_left
from collections import defaultdict, deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal

import msgspec

from server.atomic_files import replace_file
from server.engine.metrics.top_labels import TopLabels
from server.engine.scheduling.row import Row
from server.messages import AdapterRef, Stats
from server.metrics.engine_names import ENGINE
from server.metrics.labels import operation_label
from server.metrics.names import SHARED

Labels = tuple[str, ...]
Mode = Literal["off", "ids", "names"]

FAMILIES = {**ENGINE, **SHARED}
DIGEST_CHARS = 16  # of a content hash, as in system_fingerprint
MAX_LISTED_ADAPTERS = 64  # in one list of lora_requests_info
PROCESS = "engine"
TENANT_KEYS = tuple(key for key in ENGINE if key.startswith("tenant_"))
# code of an error that only a load raises -> the reason in metrics
LOAD_REASONS = {"model_not_found": "missing", "invalid_adapter": "invalid", "store_unavailable": "store"}
ADAPTER_KEYS = tuple(key for key, family in ENGINE.items() if "adapter" in family.labels)

log = logging.getLogger(__name__)


def source_of(row: Row, sources: Mapping[str, str]) -> str:
    """Where the row's last adapter was found. `sources`: digest of a loaded adapter -> its source."""
    if row.cold_start:
        return sources.get(row.uses[-1].adapter.digest, "store")
    return "device" if row.uses else ""


class Histogram:
    """Observations by bucket, [len(buckets) + 1], and their sum."""

    __slots__ = ("buckets", "counts", "total")

    def __init__(self, buckets: tuple[float, ...]) -> None:
        self.buckets = buckets
        self.counts = [0] * (len(buckets) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.buckets, value)] += 1
        self.total += value


class SavedMetrics(msgspec.Struct, array_like=True):
    """The file that one engine process leaves to the next."""

    starts: int
    counters: list[tuple[str, Labels, float]]
    histograms: list[tuple[str, Labels, list[int], float]]
    tenants: list[tuple[Labels, dict[str, float]]]
    adapters: list[tuple[Labels, dict[str, float]]]


class EngineMetrics:
    """All counters and histograms of an engine, by (key, label values)."""

    def __init__(self, path: Path | None = None, mode: Mode = "off", top: int = 0) -> None:
        """`path`: the file that keeps the values, if any. `top`: tenants and adapters with own series."""
        self.counters: defaultdict[tuple[str, Labels], float] = defaultdict(float)
        self.histograms: dict[tuple[str, Labels], Histogram] = {}
        self.from_threads: deque[tuple[str, Labels, float]] = deque()  # observations of other threads
        self.tenants = TopLabels(TENANT_KEYS, 1, top)
        self.adapters = TopLabels(ADAPTER_KEYS, 2, top)
        self._mode = mode
        self._path = path
        self._starts = 1
        self._save_failed = False  # the last report is not on disk
        if path is not None and path.exists():
            self._restore(path)
        self._base = dict(self.counters)
        self.counters["engine_restarts", ()] = self._starts - 1

    def count(self, key: str, amount: float = 1.0, *labels: str) -> None:
        self.counters[key, labels] += amount

    def set_count(self, key: str, value: float, *labels: str) -> None:
        """Set a count that another component has kept since this process began."""
        self.counters[key, labels] = self._base.get((key, labels), 0.0) + value

    def observe(self, key: str, value: float, *labels: str) -> None:
        histogram = self.histograms.get((key, labels))
        if histogram is None:
            histogram = self.histograms[key, labels] = Histogram(FAMILIES[key].buckets)
        histogram.observe(value)

    def on_store_call(self, operation: str, seconds: float, outcome: str) -> None:
        """Observe a call of the object store (`Objects.on_call`). Called from any thread."""
        operation = operation_label(operation)
        self.from_threads.append(("store_seconds", (PROCESS, operation), seconds))
        if outcome in ("failed", "refused"):
            self.from_threads.append(("store_errors", (PROCESS, operation, outcome), 1))

    def add_observations(self, observations: list[tuple[str, str, float]]) -> None:
        """Add the loader's (key, label, value); unknown keys and labels are ignored."""
        for key, label, value in observations:
            family = FAMILIES.get(key)
            if family and (not label or label in next(iter(family.labels.values()), ())):
                self._add(key, (label,) if label else (), value)

    def record_end(self, row: Row, now: float, error: str = "") -> None:
        """Observe a row that has ended, perhaps with an error code: its latencies and its tenant's counts."""
        if row.command.tenant.startswith("\0"):
            return  # a dry run of adapter_check.py
        row.end_wait(now)
        tokens, timing = row.output_length, row.timing
        if row.uses and timing.started:
            self.count("adapter_misses" if row.cold_start else "adapter_hits")
        for reason, seconds in timing.waited.items():
            self.observe("wait_seconds", seconds, reason)
        if error in LOAD_REASONS:
            self.count("adapter_load_failures", 1, LOAD_REASONS[error])
        if not error and timing.first_token:
            self.observe("queue_seconds", timing.queued)
            self.observe("prefill_seconds", timing.first_token - timing.started)
            self.observe("decode_seconds", now - timing.first_token)
            self.observe("inference_seconds", now - timing.started)
            self.observe("request_prompt_tokens", row.prompt_length - row.num_virtual_tokens)
            self.observe("request_generation_tokens", tokens)
            if tokens > 1:
                self.observe("per_token_seconds", (now - timing.first_token) / (tokens - 1))
        if self._mode != "off":
            self._attribute(row, tokens, failed=bool(error))

    def adapter_label(self, ref: AdapterRef) -> str:
        """The value of `adapter` labels."""
        return ref.name if self._mode == "names" else ref.digest[:DIGEST_CHARS]

    def adapter_list(self, rows: list[Row]) -> str:
        """The adapters of `rows`, by commas, for lora_requests_info."""
        if self._mode == "off":
            return ""
        names = dict.fromkeys(self.adapter_label(use.adapter) for row in rows for use in row.uses)
        return ",".join(list(names)[:MAX_LISTED_ADAPTERS])

    def report(self, boot: str, gauges: dict[str, float], labelled: list[tuple[str, Labels, float]]) -> Stats:
        """Write all values to disk; return them with the current gauges, without labels and `labelled`."""
        while self.from_threads:
            self._add(*self.from_threads.popleft())
        plain = {key: value for (key, labels), value in self.counters.items() if not labels}
        series = [(key, labels, value) for (key, labels), value in self.counters.items() if labels]
        histograms = [(*key, histogram.counts, histogram.total) for key, histogram in self.histograms.items()]
        self._save(histograms)
        return Stats(boot, gauges, plain, [*labelled, *series, *self._top_series()], histograms)

    def review(self, now: float) -> None:
        """Choose the tenants and adapters with series of their own again; call it often."""
        self.tenants.review(now)
        self.adapters.review(now)

    def _top_series(self) -> Iterator[tuple[str, Labels, float]]:
        if self._mode != "off":
            yield from self.tenants.series()
            yield from self.adapters.series()

    def _add(self, key: str, labels: Labels, value: float) -> None:
        if FAMILIES[key].kind == "histogram":
            self.observe(key, value, *labels)
        else:
            self.count(key, value, *labels)

    def _attribute(self, row: Row, tokens: int, *, failed: bool) -> None:
        waited, prompt = row.timing.waited, row.prompt_length - row.num_virtual_tokens
        amounts = {
            "tenant_requests": 1,
            "tenant_prompt_tokens": prompt,
            "tenant_generation_tokens": tokens,
            "tenant_wait_seconds": sum(waited.values()),
            "tenant_failures": failed,
        }
        self.tenants.add((row.command.tenant,), 1 + prompt + tokens, amounts)
        cold = waited.get("adapter", 0.0)
        amounts = {
            "adapter_requests": 1,
            "adapter_generation_tokens": tokens,
            "adapter_cold_starts": row.cold_start,
            "adapter_wait_seconds": cold,
            "adapter_failures": failed,
        }
        for use in row.uses:
            label = (row.command.tenant, self.adapter_label(use.adapter))
            self.adapters.add(label, 1 + prompt + tokens, amounts)

    def _save(self, histograms: list[tuple[str, Labels, list[int], float]]) -> None:
        if self._path is None:
            return
        counters = [(*key, value) for key, value in self.counters.items()]
        saved = SavedMetrics(
            self._starts,
            counters,
            histograms,
            [*self.tenants.counts.items()],
            [*self.adapters.counts.items()],
        )
        try:
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            replace_file(self._path, msgspec.msgpack.encode(saved), durable=False)
        except OSError as error:  # counting goes on; the next report writes them
            if not self._save_failed:
                log.warning("The engine's metrics cannot be kept for its next start: %s", error.strerror)
            self._save_failed = True
        else:
            self._save_failed = False

    def _restore(self, path: Path) -> None:
        """Continue from a saved file; of another version's, the keys that still exist."""
        try:
            saved = msgspec.msgpack.decode(path.read_bytes(), type=SavedMetrics)
        except (OSError, msgspec.DecodeError):
            log.warning("The metrics of the engine before cannot be read; counters begin at 0")
            return
        self._starts = saved.starts + 1
        self.counters.update(
            {(key, labels): value for key, labels, value in saved.counters if key in FAMILIES}
        )
        for key, labels, counts, total in saved.histograms:
            if key in FAMILIES and len(counts) == len(FAMILIES[key].buckets) + 1:
                histogram = self.histograms[key, labels] = Histogram(FAMILIES[key].buckets)
                histogram.counts, histogram.total = counts, total
        self.tenants.restore(dict(saved.tenants))
        self.adapters.restore(dict(saved.adapters))
