"""What the engine counts for /metrics: a few dictionaries, no Prometheus.

Counters and histograms are absolute and survive the process: each report is on disk before it is sent, if
there is room, and the next engine goes on from there. Keys are those of server/metrics/names.py.
"""

import logging
from bisect import bisect_left
from collections import defaultdict, deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal

import msgspec

from server.engine.metrics.top_labels import TopLabels
from server.engine.scheduling.row import Row
from server.messages import AdapterRef, Stats
from server.metrics.names import ENGINE, OPERATIONS, OTHER, SHARED

Labels = tuple[str, ...]
Mode = Literal["off", "ids", "names"]

FAMILIES = {**ENGINE, **SHARED}
DIGEST_CHARS = 16  # of a content hash, as in system_fingerprint
LISTED = 64  # adapters in one list of lora_requests_info
PROCESS = "engine"
TENANT_KEYS = tuple(key for key in ENGINE if key.startswith("tenant_"))
# what only a load can end a row with -> the reason in metrics
LOAD_REASONS = {"model_not_found": "missing", "invalid_adapter": "invalid", "store_unavailable": "store"}
ADAPTER_KEYS = tuple(key for key, family in ENGINE.items() if "adapter" in family.labels)

log = logging.getLogger(__name__)


def source_of(row: Row, sources: Mapping[str, str]) -> str:
    """Where its adapter was found; of several, the last one's. `sources` says it of what was loaded."""
    if row.cold:
        return sources.get(row.uses[-1].adapter.digest, "store")
    return "device" if row.uses else ""


class Histogram:
    """How many observations fell in each bucket, [len(buckets) + 1], and their sum."""

    __slots__ = ("buckets", "counts", "total")

    def __init__(self, buckets: tuple[float, ...]) -> None:
        self.buckets = buckets
        self.counts = [0] * (len(buckets) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.buckets, value)] += 1
        self.total += value


class Kept(msgspec.Struct, array_like=True):
    """What one engine leaves to the next."""

    starts: int
    counters: list[tuple[str, Labels, float]]
    histograms: list[tuple[str, Labels, list[int], float]]
    tenants: list[tuple[Labels, dict[str, float]]]
    adapters: list[tuple[Labels, dict[str, float]]]


class EngineMetrics:
    def __init__(self, path: Path | None = None, mode: Mode = "off", top: int = 0) -> None:
        """`path` is where they outlive the process; None: they do not."""
        self.counters: defaultdict[tuple[str, Labels], float] = defaultdict(float)
        self.histograms: dict[tuple[str, Labels], Histogram] = {}
        self.threads: deque[tuple[str, Labels, float]] = deque()  # what other threads observed
        self.tenants = TopLabels(TENANT_KEYS, 1, top)
        self.adapters = TopLabels(ADAPTER_KEYS, 2, top)
        self._mode = mode
        self._path = path
        self._starts = 1
        self._unwritten = False  # the last report is not on disk
        if path is not None and path.exists():
            self._restore(path)
        self._base = dict(self.counters)
        self.counters["engine_restarts", ()] = self._starts - 1

    def count(self, key: str, amount: float = 1.0, *labels: str) -> None:
        self.counters[key, labels] += amount

    def set_count(self, key: str, value: float, *labels: str) -> None:
        """What somebody else has counted since this process began."""
        self.counters[key, labels] = self._base.get((key, labels), 0.0) + value

    def observe(self, key: str, value: float, *labels: str) -> None:
        found = self.histograms.get((key, labels))
        if found is None:
            found = self.histograms[key, labels] = Histogram(FAMILIES[key].buckets)
        found.observe(value)

    def on_store_call(self, operation: str, seconds: float, outcome: str) -> None:
        """What `Objects.on_call` wants; from any thread."""
        operation = operation if operation in OPERATIONS else OTHER
        self.threads.append(("store_seconds", (PROCESS, operation), seconds))
        if outcome in ("failed", "refused"):
            self.threads.append(("store_errors", (PROCESS, operation, outcome), 1))

    def take(self, observations: list[tuple[str, str, float]]) -> None:
        """(key, label, value) as the loader notes them; what is in no table is left out."""
        for key, label, value in observations:
            family = FAMILIES.get(key)
            if family and (not label or label in next(iter(family.labels.values()), ())):
                self._add(key, (label,) if label else (), value)

    def ended(self, row: Row, now: float, error: str = "") -> None:
        """A row is over, with this error's code if with one: its latencies, and its owners' counts."""
        if row.command.tenant.startswith("\0"):
            return  # the gate's own
        row.wait_ends(now)
        tokens, timing = row.output_length, row.timing
        if row.uses and timing.started:
            self.count("adapter_misses" if row.cold else "adapter_hits")
        for reason, seconds in timing.waited.items():
            self.observe("wait_seconds", seconds, reason)
        if error in LOAD_REASONS:
            self.count("adapter_load_failures", 1, LOAD_REASONS[error])
        if not error and timing.first_token:
            self.observe("queue_seconds", timing.queued)
            self.observe("prefill_seconds", timing.first_token - timing.started)
            self.observe("decode_seconds", now - timing.first_token)
            self.observe("inference_seconds", now - timing.started)
            self.observe("request_prompt_tokens", row.prompt_length - row.virtual)
            self.observe("request_generation_tokens", tokens)
            if tokens > 1:
                self.observe("per_token_seconds", (now - timing.first_token) / (tokens - 1))
        if self._mode != "off":
            self._attribute(row, tokens, failed=bool(error))

    def adapter(self, ref: AdapterRef) -> str:
        """How an adapter is called in labels."""
        return ref.name if self._mode == "names" else ref.digest[:DIGEST_CHARS]

    def listed(self, rows: list[Row]) -> str:
        """The adapters of `rows` for lora_requests_info."""
        if self._mode == "off":
            return ""
        names = dict.fromkeys(self.adapter(use.adapter) for row in rows for use in row.uses)
        return ",".join(list(names)[:LISTED])

    def report(self, boot: str, gauges: dict[str, float], labelled: list[tuple[str, Labels, float]]) -> Stats:
        """All of it, as a message, and on disk. `gauges` and `labelled` are what stands at this moment."""
        while self.threads:
            self._add(*self.threads.popleft())
        plain = {key: value for (key, labels), value in self.counters.items() if not labels}
        series = [(key, labels, value) for (key, labels), value in self.counters.items() if labels]
        histograms = [(*at, found.counts, found.total) for at, found in self.histograms.items()]
        self._keep(histograms)
        return Stats(boot, gauges, plain, [*labelled, *series, *self._busiest()], histograms)

    def review(self, now: float) -> None:
        self.tenants.review(now)
        self.adapters.review(now)

    def _busiest(self) -> Iterator[tuple[str, Labels, float]]:
        if self._mode != "off":
            yield from self.tenants.series()
            yield from self.adapters.series()

    def _add(self, key: str, labels: Labels, value: float) -> None:
        if FAMILIES[key].kind == "histogram":
            self.observe(key, value, *labels)
        else:
            self.count(key, value, *labels)

    def _attribute(self, row: Row, tokens: int, *, failed: bool) -> None:
        waited, prompt = row.timing.waited, row.prompt_length - row.virtual
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
            "adapter_cold_starts": row.cold,
            "adapter_wait_seconds": cold,
            "adapter_failures": failed,
        }
        for use in row.uses:
            label = (row.command.tenant, self.adapter(use.adapter))
            self.adapters.add(label, 1 + prompt + tokens, amounts)

    def _keep(self, histograms: list[tuple[str, Labels, list[int], float]]) -> None:
        if self._path is None:
            return
        counters = [(*at, value) for at, value in self.counters.items()]
        kept = Kept(
            self._starts,
            counters,
            histograms,
            [*self.tenants.counts.items()],
            [*self.adapters.counts.items()],
        )
        draft = self._path.with_suffix(".new")
        try:
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            draft.write_bytes(msgspec.msgpack.encode(kept))  # no fsync: for the next process, not machine
            draft.replace(self._path)
        except OSError as error:  # they go on here, and are written when there is room again
            if not self._unwritten:
                log.warning("The engine's figures cannot be kept for its next start: %s", error.strerror)
            self._unwritten = True
        else:
            self._unwritten = False

    def _restore(self, path: Path) -> None:
        """Of another version's file, what still has a meaning."""
        try:
            kept = msgspec.msgpack.decode(path.read_bytes(), type=Kept)
        except (OSError, msgspec.DecodeError):
            log.warning("The figures of the engine before cannot be read; counters begin at 0")
            return
        self._starts = kept.starts + 1
        self.counters.update(
            {(key, labels): value for key, labels, value in kept.counters if key in FAMILIES}
        )
        for key, labels, counts, total in kept.histograms:
            if key in FAMILIES and len(counts) == len(FAMILIES[key].buckets) + 1:
                found = self.histograms[key, labels] = Histogram(FAMILIES[key].buckets)
                found.counts, found.total = counts, total
        self.tenants.restore(dict(kept.tenants))
        self.adapters.restore(dict(kept.adapters))
