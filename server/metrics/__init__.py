"""Every Prometheus name of the server, in one place. vLLM's names where they mean the same.

No label holds a tenant, a key, an adapter or anything else a caller chooses: the number of series is fixed
by the routes, the status codes and the tiers. Engine figures arrive as `messages.Stats`.
"""

import time

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from server.engine.messages import Stats

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
TOKENS = (1, 4, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)

# key in Stats.gauges -> (name, labels, help); slots_* and *_bytes are the adapter cache's
GAUGES: dict[str, tuple[str, dict[str, str], str]] = {
    "running": ("vllm:num_requests_running", {}, "Rows in the batch"),
    "waiting": ("vllm:num_requests_waiting", {}, "Rows that wait for the batch"),
    "kv_usage": ("vllm:kv_cache_usage_perc", {}, "Share of KV blocks in use, 0 to 1"),
    "slots_used": ("polypeft_adapter_slots_used", {}, "Device slots that hold an adapter"),
    "slots_total": ("polypeft_adapter_slots_total", {}, "Device slots"),
    "device_bytes": ("polypeft_adapter_bytes", {"tier": "device"}, "Adapter bytes held, by tier"),
    "ram_bytes": ("polypeft_adapter_bytes", {"tier": "ram"}, "Adapter bytes held, by tier"),
    "disk_bytes": ("polypeft_adapter_bytes", {"tier": "disk"}, "Adapter bytes held, by tier"),
    "device_adapters": ("polypeft_adapters_resident", {"tier": "device"}, "Adapters held, by tier"),
    "ram_adapters": ("polypeft_adapters_resident", {"tier": "ram"}, "Adapters held, by tier"),
    "disk_adapters": ("polypeft_adapters_resident", {"tier": "disk"}, "Adapters held, by tier"),
}
COUNTERS: dict[str, tuple[str, str]] = {
    "prompt_tokens": ("vllm:prompt_tokens", "Prompt tokens processed"),
    "generation_tokens": ("vllm:generation_tokens", "Tokens generated"),
    "prefix_queries": ("vllm:prefix_cache_queries", "Prompt tokens looked up in the prefix cache"),
    "prefix_hits": ("vllm:prefix_cache_hits", "Prompt tokens found in the prefix cache"),
    "preemptions": ("vllm:num_preemptions", "Rows put back because KV ran out"),
    "adapter_hits": ("polypeft_adapter_cache_hits", "Rows whose adapter was on the device"),
    "adapter_misses": ("polypeft_adapter_cache_misses", "Rows whose adapter had to be loaded"),
    "adapter_evictions": ("polypeft_adapter_cache_evictions", "Adapters that left a device slot"),
    "adapter_load_failures": ("polypeft_adapter_load_failures", "Adapters that could not be loaded"),
    "adapter_corrupt_copies": ("polypeft_adapter_corrupt_copies", "Cached copies that failed their SHA-256"),
    "non_finite_rows": ("polypeft_non_finite_rows", "Rows ended because of NaN or Inf"),
    "steps": ("polypeft_engine_steps", "Forward passes"),
}
TIERS = frozenset({"device", "ram", "disk", "store"})


class Metrics:
    """One registry a process; the engine's figures are folded in by `absorb`."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self._gauges = _gauges(registry)
        self._counters = {
            key: Counter(name, text, registry=registry) for key, (name, text) in COUNTERS.items()
        }
        self._seen: dict[str, float] = {}
        self._boot: str | None = None
        self.engine_restarts = Counter(
            "polypeft_engine_restarts", "Times the engine came back as a new process", registry=registry
        )
        self.lora_info = Gauge(
            "vllm:lora_requests_info",
            "Unix time of the last figures. Adapter names are tenants' own, so both lists stay empty",
            ["max_lora", "running_lora_adapters", "waiting_lora_adapters"],
            registry=registry,
        )
        self.http_requests = Counter(
            "polypeft_http_requests", "HTTP requests answered", ["route", "status"], registry=registry
        )
        self.finished = Counter(
            "vllm:request_success", "Choices finished, by reason", ["finished_reason"], registry=registry
        )
        self.first_token = _seconds("vllm:time_to_first_token_seconds", "Arrival to first token", registry)
        self.between_tokens = _seconds("vllm:inter_token_latency_seconds", "Between a row's tokens", registry)
        self.end_to_end = _seconds("vllm:e2e_request_latency_seconds", "Arrival to last token", registry)
        self._load = Histogram(
            "polypeft_adapter_load_seconds",
            "One adapter into a tier",
            ["tier"],
            buckets=SECONDS,
            registry=registry,
        )
        self._rows = Histogram("polypeft_batch_rows", "Rows in a step", buckets=ROWS, registry=registry)
        self._tokens = Histogram(
            "polypeft_batch_tokens", "Tokens in a step", buckets=TOKENS, registry=registry
        )

    def absorb(self, stats: Stats) -> None:
        """Fold one Stats in. Counters are absolute since the engine's start and go on across restarts."""
        if stats.boot != self._boot:
            if self._boot is not None:
                self.engine_restarts.inc()
            self._boot, self._seen = stats.boot, {}
        for key, value in stats.gauges.items():
            if gauge := self._gauges.get(key):
                gauge.set(value)
        for key, value in stats.counters.items():
            if counter := self._counters.get(key):
                counter.inc(max(0.0, value - self._seen.get(key, 0.0)))
                self._seen[key] = value
        for name, label, value in stats.observations:
            self._observe(name, label, value)
        slots = str(int(stats.gauges.get("slots_total", 0)))
        self.lora_info.labels(slots, "", "").set(time.time())

    def render(self) -> bytes:
        """Prometheus text format 0.0.4."""
        return generate_latest(self.registry)

    def _observe(self, name: str, label: str, value: float) -> None:
        if name == "adapter_load_seconds" and label in TIERS:
            self._load.labels(label).observe(value)
        elif name == "batch_rows":
            self._rows.observe(value)
        elif name == "batch_tokens":
            self._tokens.observe(value)


def _gauges(registry: CollectorRegistry) -> dict[str, Gauge]:
    """The gauge, or the labelled child of one, behind each key of Stats.gauges."""
    families: dict[str, Gauge] = {}
    children = {}
    for key, (name, labels, text) in GAUGES.items():
        if name not in families:
            families[name] = Gauge(name, text, list(labels), registry=registry)
        children[key] = families[name].labels(**labels) if labels else families[name]
    return children


def _seconds(name: str, text: str, registry: CollectorRegistry) -> Histogram:
    return Histogram(name, text, buckets=SECONDS, registry=registry)
