"""Every Prometheus name of the system, in one place: declarations only. vLLM's name where it means the same.

Each family stands under a key by which the code speaks of it. Every label has its values listed here, or is
bounded otherwise (see `OPEN`): no caller can make a series. docs/metrics.md is made from these tables.
"""

from collections.abc import Mapping
from typing import Literal, NamedTuple

Kind = Literal["counter", "gauge", "histogram"]
Values = tuple[str, ...]

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
SHORT = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
CALLS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
ROUTES = (0.01, 0.05, 0.25, 1, 5, 30, 120, 600)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
TOKENS = (1, 4, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)

# Labels whose values no table lists, and what bounds their number
OPEN: Mapping[str, str] = {
    "route": "the routes' templates, and `other`",
    "status": "the statuses this server answers with",
    "code": "the error codes of server/errors.py",
    "tenant": "the busiest `metrics_top` tenants' ids, and `other`",
    "adapter": "with `tenant`, the busiest `metrics_top` adapters, and `other`",
    "worker": "workers heard of within a minute, 64 at most",
    "model_name": "the base's id",
    "version": "one",
    "python": "one",
    "torch": "one",
    "max_lora": "the number of device slots",
    "running_lora_adapters": "one list",
    "waiting_lora_adapters": "one list",
}
VLLM = {"model_name": (), "engine": ("0",)}  # on every family of vLLM's
OTHER = "other"

WAITS = ("capacity", "adapter", "sibling", "grammar")
PHASES = ("schedule", "forward", "adapter", "sample", "deliver")
TIERS = ("device", "ram", "disk")
SOURCES = ("ram", "disk", "store")
LOAD_FAILURES = ("missing", "invalid", "store")
GATE_REFUSALS = ("invalid", "non_finite", "no_effect", "too_large", "store", OTHER)
CLASSES = ("anonymous", "operator", "low", "standard", "high")
FINISHED = ("stop", "length", "abort", "error")
REJECTIONS = ("queue_full", "draining", "engine_unavailable", "quota")
RATES = ("requests", "tokens", "concurrent", "size")
OPERATIONS = ("put", "create", "get", "download", "head", "delete", "list", "sign_put", OTHER)
PROCESSES = ("api", "engine", "worker")
OUTCOMES = ("finished", "saved", "crashed", "cancelled", "lost", "time", "disk", OTHER)


class Family(NamedTuple):
    name: str  # a counter's without `_total`
    kind: Kind
    help: str
    labels: Mapping[str, Values] = {}  # label -> its values; empty: see OPEN
    buckets: tuple[float, ...] = ()

    @property
    def all_labels(self) -> dict[str, Values]:
        """vLLM's base labels first."""
        return {**(VLLM if self.name.startswith("vllm:") else {}), **self.labels}

    @property
    def shown(self) -> str:
        """The name as /metrics has it."""
        return f"{self.name}_total" if self.kind == "counter" else self.name


def _gauge(name: str, text: str, **labels: Values) -> Family:
    return Family(name, "gauge", text, labels)


def _counter(name: str, text: str, **labels: Values) -> Family:
    return Family(name, "counter", text, labels)


def _histogram(name: str, buckets: tuple[float, ...], text: str, **labels: Values) -> Family:
    return Family(name, "histogram", text, labels, buckets)


# The engine counts these itself; they go on where they were when it is restarted.
ENGINE: Mapping[str, Family] = {
    "running": _gauge("vllm:num_requests_running", "Rows in the batch"),
    "waiting": _gauge("vllm:num_requests_waiting", "Rows that wait for the batch"),
    "waiting_by_reason": _gauge(
        "vllm:num_requests_waiting_by_reason",
        "Rows that wait, by what for: room in the batch, an adapter that is being loaded, the prefill of a "
        "sibling (n > 1), or a grammar that is being compiled",
        reason=WAITS,
    ),
    "kv_usage": _gauge("vllm:kv_cache_usage_perc", "Share of KV blocks in use, 0 to 1"),
    "lora_info": _gauge(
        "vllm:lora_requests_info",
        "Unix time of the last figures; adapters that run and wait, comma-separated. Both lists are empty "
        "unless metrics_adapter_labels is on",
        max_lora=(),
        running_lora_adapters=(),
        waiting_lora_adapters=(),
    ),
    "prompt_tokens": _counter("vllm:prompt_tokens", "Prompt tokens processed, cached ones left out"),
    "generation_tokens": _counter("vllm:generation_tokens", "Tokens generated"),
    "guessed_tokens": _counter("vllm:spec_decode_num_draft_tokens", "Tokens guessed ahead"),
    "guessed_right": _counter("vllm:spec_decode_num_accepted_tokens", "Guessed tokens that were right"),
    "prefix_queries": _counter("vllm:prefix_cache_queries", "Prompt tokens looked up in the prefix cache"),
    "prefix_hits": _counter("vllm:prefix_cache_hits", "Prompt tokens found in the prefix cache"),
    "preemptions": _counter("vllm:num_preemptions", "Rows put back: KV ran out, or another tenant was due"),
    "batch_tokens": _histogram("vllm:iteration_tokens_total", TOKENS, "Tokens in a step"),
    "request_prompt_tokens": _histogram("vllm:request_prompt_tokens", TOKENS, "Prompt tokens of a row"),
    "request_generation_tokens": _histogram(
        "vllm:request_generation_tokens", TOKENS, "Tokens generated for a row"
    ),
    "queue_seconds": _histogram("vllm:request_queue_time_seconds", SECONDS, "A row's wait for the batch"),
    "prefill_seconds": _histogram(
        "vllm:request_prefill_time_seconds", SECONDS, "From a row's first step to its first token"
    ),
    "decode_seconds": _histogram(
        "vllm:request_decode_time_seconds", SECONDS, "From a row's first token to its last"
    ),
    "inference_seconds": _histogram(
        "vllm:request_inference_time_seconds", SECONDS, "From a row's first step to its last token"
    ),
    "per_token_seconds": _histogram(
        "vllm:request_time_per_output_token_seconds", SECONDS, "A row's decode time over its tokens"
    ),
    "wait_seconds": _histogram(
        "polypeft_request_wait_seconds", SECONDS, "A row's wait, by what it waited for", reason=WAITS
    ),
    "steps": _counter("polypeft_engine_steps", "Forward passes"),
    "batch_rows": _histogram("polypeft_batch_rows", ROWS, "Rows in a step"),
    "step_seconds": _histogram(
        "polypeft_step_seconds",
        SHORT,
        "Time of a step by phase; `adapter` is part of `forward` and is measured in every 16th step; on CUDA "
        "all phases are in every 64th, in which nothing overlaps",
        phase=PHASES,
    ),
    "slots_used": _gauge("polypeft_adapter_slots_used", "Device slots that hold an adapter"),
    "slots_total": _gauge("polypeft_adapter_slots_total", "Device slots"),
    "adapter_bytes": _gauge("polypeft_adapter_bytes", "Adapter bytes held, by tier", tier=TIERS),
    "adapter_budget": _gauge("polypeft_adapter_budget_bytes", "Adapter bytes a tier may hold", tier=TIERS),
    "adapters_resident": _gauge("polypeft_adapters_resident", "Adapters held, by tier", tier=TIERS),
    "adapter_hits": _counter("polypeft_adapter_cache_hits", "Rows whose adapters were on the device"),
    "adapter_misses": _counter("polypeft_adapter_cache_misses", "Rows that waited for an adapter's load"),
    "adapter_evictions": _counter(
        "polypeft_adapter_cache_evictions", "Adapters that made room for another, by tier", tier=TIERS
    ),
    "adapter_load_seconds": _histogram(
        "polypeft_adapter_load_seconds", SECONDS, "One adapter's load, by where it was found", tier=SOURCES
    ),
    "adapter_load_bytes": _counter(
        "polypeft_adapter_load_bytes", "Bytes of adapters loaded, by where they were found", tier=SOURCES
    ),
    "adapter_load_failures": _counter(
        "polypeft_adapter_load_failures", "Adapters that could not be loaded", reason=LOAD_FAILURES
    ),
    "adapter_corrupt_copies": _counter(
        "polypeft_adapter_corrupt_copies",
        "Copies that were not what they should be, and were not used",
        tier=(*TIERS, "store"),
    ),
    "gate_accepted": _counter("polypeft_gate_accepted", "New versions that passed the engine's check"),
    "gate_refusals": _counter(
        "polypeft_gate_refusals", "New versions that failed the engine's check", reason=GATE_REFUSALS
    ),
    "internal_errors": _counter("polypeft_internal_errors", "Rows and commands of the engine ended by a bug"),
    "non_finite_rows": _counter("polypeft_non_finite_rows", "Rows ended because of NaN or Inf"),
    "engine_restarts": _counter("polypeft_engine_restarts", "Times the engine came back as a new process"),
    "gpu_memory": _gauge(
        "polypeft_gpu_memory_bytes",
        "The engine's GPU memory; no series on a CPU",
        kind=("allocated", "reserved", "total"),
    ),
    # Only with metrics_adapter_labels: the busiest, the rest under `other`
    "tenant_requests": _counter("polypeft_tenant_requests", "Rows ended", tenant=()),
    "tenant_prompt_tokens": _counter(
        "polypeft_tenant_prompt_tokens", "Prompt tokens of rows that ended", tenant=()
    ),
    "tenant_generation_tokens": _counter("polypeft_tenant_generation_tokens", "Tokens generated", tenant=()),
    "tenant_wait_seconds": _counter("polypeft_tenant_wait_seconds", "Time rows waited", tenant=()),
    "tenant_failures": _counter("polypeft_tenant_failures", "Rows that ended in an error", tenant=()),
    "adapter_requests": _counter("polypeft_adapter_requests", "Rows ended", tenant=(), adapter=()),
    "adapter_generation_tokens": _counter(
        "polypeft_adapter_generation_tokens", "Tokens generated", tenant=(), adapter=()
    ),
    "adapter_cold_starts": _counter(
        "polypeft_adapter_cold_starts", "Rows that waited for this adapter's load", tenant=(), adapter=()
    ),
    "adapter_wait_seconds": _counter(
        "polypeft_adapter_wait_seconds", "Time rows waited for this adapter's load", tenant=(), adapter=()
    ),
    "adapter_failures": _counter(
        "polypeft_adapter_failures", "Rows that ended in an error", tenant=(), adapter=()
    ),
}

# Each API process counts for itself; /metrics shows the sum over all processes of one `serve`.
API: Mapping[str, Family] = {
    "http_requests": _counter(
        "polypeft_http_requests",
        "HTTP requests answered; 499: the client left first. A tenant's class goes by its weight: below, at "
        "or above 1",
        route=(),
        status=(),
        tenant_class=CLASSES,
    ),
    "http_seconds": _histogram(
        "polypeft_http_request_seconds", ROUTES, "From a request's arrival to its last byte", route=()
    ),
    "http_open": _gauge("polypeft_http_requests_under_way", "HTTP requests under way"),
    "first_token": _histogram("vllm:time_to_first_token_seconds", SECONDS, "Arrival to first token"),
    "between_tokens": _histogram("vllm:inter_token_latency_seconds", SECONDS, "Between a row's tokens"),
    "end_to_end": _histogram("vllm:e2e_request_latency_seconds", SECONDS, "Arrival to last token"),
    "finished": _counter(
        "vllm:request_success", "Choices ended, by how; abort: the client left", finished_reason=FINISHED
    ),
    "failures": _counter("polypeft_request_failures", "Generations ended by an error", code=()),
    "rejections": _counter(
        "vllm:admission_rejections",
        "Generations refused at the door; quota: any request beyond a tenant's limit",
        reason=REJECTIONS,
    ),
    "rate_limited": _counter("polypeft_rate_limited", "Refused by a tenant's rate limits", limit=RATES),
    "valkey_seconds": _histogram("polypeft_valkey_call_seconds", CALLS, "Calls of Valkey, pipelines as one"),
    "valkey_errors": _counter("polypeft_valkey_errors", "Calls of Valkey that failed"),
}

# Of the system as a whole, out of Valkey: every API shows the same, so take the max, not the sum.
FLEET: Mapping[str, Family] = {
    "engine_up": _gauge("polypeft_engine_up", "1 while the engine answers this API"),
    "build_info": _gauge("polypeft_build_info", "Always 1", version=(), python=(), torch=(), model_name=()),
    "valkey_up": _gauge("polypeft_valkey_up", "1 while Valkey answers"),
    "valkey_aof_ok": _gauge("polypeft_valkey_aof_ok", "0 when Valkey cannot write to its file"),
    "valkey_memory": _gauge("polypeft_valkey_memory_bytes", "Memory Valkey uses"),
    "tenants": _gauge("polypeft_tenants", "Tenants"),
    "adapters_registered": _gauge("polypeft_adapters_registered", "Adapters of all tenants"),
    "jobs": _gauge("polypeft_jobs", "Unfinished jobs", state=("queued", "training", "publishing")),
    "jobs_finished": _counter(
        "polypeft_jobs_finished", "Jobs ended", status=("succeeded", "failed", "cancelled")
    ),
    "job_silence": _gauge(
        "polypeft_job_heartbeat_age_seconds",
        "Silence of the worker heard of longest ago, of those with a job",
    ),
    "workers": _gauge("polypeft_workers", "Workers heard of within a minute", state=("idle", "busy")),
    "attempts": _counter(
        "polypeft_training_attempts", "Attempts at a job, by how they ended", outcome=OUTCOMES
    ),
    "training_tokens": _counter("polypeft_training_tokens", "Tokens trained on"),
    "training_steps": _counter("polypeft_training_steps", "Updates"),
    "training_loss": _gauge(
        "polypeft_training_loss", "Loss of the last update, by worker; not on a page open to all", worker=()
    ),
    "checkpoints": _counter("polypeft_checkpoints", "Checkpoints stored"),
    "checkpoint_bytes": _counter("polypeft_checkpoint_bytes", "Bytes of checkpoints stored"),
}

# Of more than one process, told apart by the label
SHARED: Mapping[str, Family] = {
    "memory": _gauge("polypeft_process_resident_memory_bytes", "Resident memory", process=PROCESSES),
    "store_seconds": _histogram(
        "polypeft_store_call_seconds",
        CALLS,
        "Calls of the object store",
        process=PROCESSES,
        operation=OPERATIONS,
    ),
    "store_errors": _counter(
        "polypeft_store_errors",
        "Calls of the object store that failed, or were refused by the breaker",
        process=PROCESSES,
        operation=OPERATIONS,
        outcome=("failed", "refused"),
    ),
    "store_breaker": _gauge(
        "polypeft_store_breaker_open", "1 while calls of the object store are refused", process=PROCESSES[:2]
    ),
}

# On a worker's own port
WORKER: Mapping[str, Family] = {
    "worker_busy": _gauge("polypeft_worker_busy", "1 while it has a job"),
    "worker_attempts": _counter("polypeft_worker_attempts", "Attempts at a job", outcome=OUTCOMES),
    "worker_tokens": _counter("polypeft_worker_training_tokens", "Tokens trained on"),
    "worker_steps": _counter("polypeft_worker_training_steps", "Updates"),
    "worker_loss": _gauge("polypeft_worker_training_loss", "Loss of the last update"),
    "worker_checkpoints": _counter("polypeft_worker_checkpoints", "Checkpoints stored"),
    "worker_checkpoint_bytes": _counter("polypeft_worker_checkpoint_bytes", "Bytes of checkpoints stored"),
    "worker_silence": _gauge(
        "polypeft_worker_heartbeat_age_seconds", "Since the last heartbeat of its job was heard; 0: no job"
    ),
    "worker_beat_failures": _counter("polypeft_worker_heartbeat_failures", "Heartbeats nobody heard"),
}

FAMILIES: Mapping[str, Family] = {**ENGINE, **API, **FLEET, **SHARED, **WORKER}
ON_API = FAMILIES.keys() - WORKER.keys()
ON_WORKER = {*WORKER, "memory", "store_seconds", "store_errors", "build_info"}
