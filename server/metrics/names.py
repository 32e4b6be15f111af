"""Every Prometheus metric of the system: declarations only. vLLM's name where it means the same.

To add one, declare it in a table below, under a key; then give that key its values, where the table says:

    ENGINE   events, as they happen: `count` and `observe` of EngineMetrics (engine/metrics/counters.py).
             States, and counts that a component keeps itself: read once a second by engine/snapshot.py
    API      `count` and `observe` of Metrics (metrics/exposition.py), which handlers have as deps.metrics
    FLEET    read from Valkey at a scrape: api/cluster_metrics.py
    SHARED   of several kinds of process: at the places of ENGINE, API and WORKER
    WORKER   finetune/worker/metrics.py

Each label has its values listed here, or is bounded otherwise (see `OPEN`): no request can add a series.
docs.py makes the tables of docs/metrics.md of these; a test compares them.
"""

from collections.abc import Mapping

from server.metrics.family import (
    CALLS,
    ROUTES,
    ROWS,
    SECONDS,
    SHORT,
    TOKENS,
    Family,
    counter,
    gauge,
    histogram,
)

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

# The engine counts these itself; they go on where they were when it is restarted.
ENGINE: Mapping[str, Family] = {
    "running": gauge("vllm:num_requests_running", "Rows in the batch"),
    "waiting": gauge("vllm:num_requests_waiting", "Rows that wait for the batch"),
    "waiting_by_reason": gauge(
        "vllm:num_requests_waiting_by_reason",
        "Rows that wait, by what for: room in the batch, an adapter that is being loaded, the prefill of a "
        "sibling (n > 1), or a grammar that is being compiled",
        reason=WAITS,
    ),
    "kv_usage": gauge("vllm:kv_cache_usage_perc", "Share of KV blocks in use, 0 to 1"),
    "lora_info": gauge(
        "vllm:lora_requests_info",
        "Unix time of the last figures; adapters that run and wait, comma-separated. Both lists are empty "
        "unless metrics_adapter_labels is on",
        max_lora=(),
        running_lora_adapters=(),
        waiting_lora_adapters=(),
    ),
    "prompt_tokens": counter("vllm:prompt_tokens", "Prompt tokens processed, cached ones left out"),
    "generation_tokens": counter("vllm:generation_tokens", "Tokens generated"),
    "guessed_tokens": counter("vllm:spec_decode_num_draft_tokens", "Tokens guessed ahead"),
    "guessed_right": counter("vllm:spec_decode_num_accepted_tokens", "Guessed tokens that were right"),
    "prefix_queries": counter("vllm:prefix_cache_queries", "Prompt tokens looked up in the prefix cache"),
    "prefix_hits": counter("vllm:prefix_cache_hits", "Prompt tokens found in the prefix cache"),
    "preemptions": counter("vllm:num_preemptions", "Rows put back: KV ran out, or another tenant was due"),
    "batch_tokens": histogram("vllm:iteration_tokens_total", TOKENS, "Tokens in a step"),
    "request_prompt_tokens": histogram("vllm:request_prompt_tokens", TOKENS, "Prompt tokens of a row"),
    "request_generation_tokens": histogram(
        "vllm:request_generation_tokens", TOKENS, "Tokens generated for a row"
    ),
    "queue_seconds": histogram("vllm:request_queue_time_seconds", SECONDS, "A row's wait for the batch"),
    "prefill_seconds": histogram(
        "vllm:request_prefill_time_seconds", SECONDS, "From a row's first step to its first token"
    ),
    "decode_seconds": histogram(
        "vllm:request_decode_time_seconds", SECONDS, "From a row's first token to its last"
    ),
    "inference_seconds": histogram(
        "vllm:request_inference_time_seconds", SECONDS, "From a row's first step to its last token"
    ),
    "per_token_seconds": histogram(
        "vllm:request_time_per_output_token_seconds", SECONDS, "A row's decode time over its tokens"
    ),
    "wait_seconds": histogram(
        "polypeft_request_wait_seconds", SECONDS, "A row's wait, by what it waited for", reason=WAITS
    ),
    "steps": counter("polypeft_engine_steps", "Forward passes"),
    "batch_rows": histogram("polypeft_batch_rows", ROWS, "Rows in a step"),
    "step_seconds": histogram(
        "polypeft_step_seconds",
        SHORT,
        "Time of a step by phase; `adapter` is part of `forward` and is measured in every 16th step; on CUDA "
        "all phases are in every 64th, in which nothing overlaps",
        phase=PHASES,
    ),
    "slots_used": gauge("polypeft_adapter_slots_used", "Device slots that hold an adapter"),
    "slots_total": gauge("polypeft_adapter_slots_total", "Device slots"),
    "adapter_bytes": gauge("polypeft_adapter_bytes", "Adapter bytes held, by tier", tier=TIERS),
    "adapter_budget": gauge("polypeft_adapter_budget_bytes", "Adapter bytes a tier may hold", tier=TIERS),
    "adapters_resident": gauge("polypeft_adapters_resident", "Adapters held, by tier", tier=TIERS),
    "adapter_hits": counter("polypeft_adapter_cache_hits", "Rows whose adapters were on the device"),
    "adapter_misses": counter("polypeft_adapter_cache_misses", "Rows that waited for an adapter's load"),
    "adapter_evictions": counter(
        "polypeft_adapter_cache_evictions", "Adapters that made room for another, by tier", tier=TIERS
    ),
    "adapter_load_seconds": histogram(
        "polypeft_adapter_load_seconds", SECONDS, "One adapter's load, by where it was found", tier=SOURCES
    ),
    "adapter_load_bytes": counter(
        "polypeft_adapter_load_bytes", "Bytes of adapters loaded, by where they were found", tier=SOURCES
    ),
    "adapter_load_failures": counter(
        "polypeft_adapter_load_failures", "Adapters that could not be loaded", reason=LOAD_FAILURES
    ),
    "adapter_corrupt_copies": counter(
        "polypeft_adapter_corrupt_copies",
        "Copies that were not what they should be, and were not used",
        tier=(*TIERS, "store"),
    ),
    "gate_accepted": counter("polypeft_gate_accepted", "New versions that passed the engine's check"),
    "gate_refusals": counter(
        "polypeft_gate_refusals", "New versions that failed the engine's check", reason=GATE_REFUSALS
    ),
    "internal_errors": counter("polypeft_internal_errors", "Rows and commands of the engine ended by a bug"),
    "non_finite_rows": counter("polypeft_non_finite_rows", "Rows ended because of NaN or Inf"),
    "engine_restarts": counter("polypeft_engine_restarts", "Times the engine came back as a new process"),
    "gpu_memory": gauge(
        "polypeft_gpu_memory_bytes",
        "The engine's GPU memory; no series on a CPU",
        kind=("allocated", "reserved", "total"),
    ),
    # Only with metrics_adapter_labels: the busiest, the rest under `other`
    "tenant_requests": counter("polypeft_tenant_requests", "Rows ended", tenant=()),
    "tenant_prompt_tokens": counter(
        "polypeft_tenant_prompt_tokens", "Prompt tokens of rows that ended", tenant=()
    ),
    "tenant_generation_tokens": counter("polypeft_tenant_generation_tokens", "Tokens generated", tenant=()),
    "tenant_wait_seconds": counter("polypeft_tenant_wait_seconds", "Time rows waited", tenant=()),
    "tenant_failures": counter("polypeft_tenant_failures", "Rows that ended in an error", tenant=()),
    "adapter_requests": counter("polypeft_adapter_requests", "Rows ended", tenant=(), adapter=()),
    "adapter_generation_tokens": counter(
        "polypeft_adapter_generation_tokens", "Tokens generated", tenant=(), adapter=()
    ),
    "adapter_cold_starts": counter(
        "polypeft_adapter_cold_starts", "Rows that waited for this adapter's load", tenant=(), adapter=()
    ),
    "adapter_wait_seconds": counter(
        "polypeft_adapter_wait_seconds", "Time rows waited for this adapter's load", tenant=(), adapter=()
    ),
    "adapter_failures": counter(
        "polypeft_adapter_failures", "Rows that ended in an error", tenant=(), adapter=()
    ),
}

# Each API process counts for itself; /metrics shows the sum over all processes of one `serve`.
API: Mapping[str, Family] = {
    "http_requests": counter(
        "polypeft_http_requests",
        "HTTP requests answered; 499: the client left first. A tenant's class goes by its weight: below, at "
        "or above 1",
        route=(),
        status=(),
        tenant_class=CLASSES,
    ),
    "http_seconds": histogram(
        "polypeft_http_request_seconds", ROUTES, "From a request's arrival to its last byte", route=()
    ),
    "http_open": gauge("polypeft_http_requests_under_way", "HTTP requests under way"),
    "first_token": histogram("vllm:time_to_first_token_seconds", SECONDS, "Arrival to first token"),
    "between_tokens": histogram("vllm:inter_token_latency_seconds", SECONDS, "Between a row's tokens"),
    "end_to_end": histogram("vllm:e2e_request_latency_seconds", SECONDS, "Arrival to last token"),
    "finished": counter(
        "vllm:request_success",
        "Choices ended, by how; abort: the client left",
        finished_reason=FINISHED,
    ),
    "failures": counter("polypeft_request_failures", "Generations ended by an error", code=()),
    "rejections": counter(
        "vllm:admission_rejections",
        "Generations refused at the door; quota: any request beyond a tenant's limit",
        reason=REJECTIONS,
    ),
    "rate_limited": counter("polypeft_rate_limited", "Refused by a tenant's rate limits", limit=RATES),
    "valkey_seconds": histogram("polypeft_valkey_call_seconds", CALLS, "Calls of Valkey, pipelines as one"),
    "valkey_errors": counter("polypeft_valkey_errors", "Calls of Valkey that failed"),
}

# Of the system as a whole, out of Valkey: every API shows the same, so take the max, not the sum.
FLEET: Mapping[str, Family] = {
    "engine_up": gauge("polypeft_engine_up", "1 while the engine answers this API"),
    "build_info": gauge("polypeft_build_info", "Always 1", version=(), python=(), torch=(), model_name=()),
    "valkey_up": gauge("polypeft_valkey_up", "1 while Valkey answers"),
    "valkey_aof_ok": gauge("polypeft_valkey_aof_ok", "0 when Valkey cannot write to its file"),
    "valkey_memory": gauge("polypeft_valkey_memory_bytes", "Memory Valkey uses"),
    "tenants": gauge("polypeft_tenants", "Tenants"),
    "adapters_registered": gauge("polypeft_adapters_registered", "Adapters of all tenants"),
    "jobs": gauge("polypeft_jobs", "Unfinished jobs", state=("queued", "training", "publishing")),
    "jobs_finished": counter(
        "polypeft_jobs_finished", "Jobs ended", status=("succeeded", "failed", "cancelled")
    ),
    "job_silence": gauge(
        "polypeft_job_heartbeat_age_seconds",
        "Silence of the worker heard of longest ago, of those with a job",
    ),
    "workers": gauge("polypeft_workers", "Workers heard of within a minute", state=("idle", "busy")),
    "attempts": counter(
        "polypeft_training_attempts", "Attempts at a job, by how they ended", outcome=OUTCOMES
    ),
    "training_tokens": counter("polypeft_training_tokens", "Tokens trained on"),
    "training_steps": counter("polypeft_training_steps", "Updates"),
    "training_loss": gauge(
        "polypeft_training_loss", "Loss of the last update, by worker; not on a page open to all", worker=()
    ),
    "checkpoints": counter("polypeft_checkpoints", "Checkpoints stored"),
    "checkpoint_bytes": counter("polypeft_checkpoint_bytes", "Bytes of checkpoints stored"),
}

# Of more than one process, told apart by the label
SHARED: Mapping[str, Family] = {
    "memory": gauge("polypeft_process_resident_memory_bytes", "Resident memory", process=PROCESSES),
    "store_seconds": histogram(
        "polypeft_store_call_seconds",
        CALLS,
        "Calls of the object store",
        process=PROCESSES,
        operation=OPERATIONS,
    ),
    "store_errors": counter(
        "polypeft_store_errors",
        "Calls of the object store that failed, or were refused by the breaker",
        process=PROCESSES,
        operation=OPERATIONS,
        outcome=("failed", "refused"),
    ),
    "store_breaker": gauge(
        "polypeft_store_breaker_open", "1 while calls of the object store are refused", process=PROCESSES[:2]
    ),
}

# On a worker's own port
WORKER: Mapping[str, Family] = {
    "worker_busy": gauge("polypeft_worker_busy", "1 while it has a job"),
    "worker_attempts": counter("polypeft_worker_attempts", "Attempts at a job", outcome=OUTCOMES),
    "worker_tokens": counter("polypeft_worker_training_tokens", "Tokens trained on"),
    "worker_steps": counter("polypeft_worker_training_steps", "Updates"),
    "worker_loss": gauge("polypeft_worker_training_loss", "Loss of the last update"),
    "worker_checkpoints": counter("polypeft_worker_checkpoints", "Checkpoints stored"),
    "worker_checkpoint_bytes": counter("polypeft_worker_checkpoint_bytes", "Bytes of checkpoints stored"),
    "worker_silence": gauge(
        "polypeft_worker_heartbeat_age_seconds", "Since the last heartbeat of its job was heard; 0: no job"
    ),
    "worker_beat_failures": counter("polypeft_worker_heartbeat_failures", "Heartbeats nobody heard"),
}

FAMILIES: Mapping[str, Family] = {**ENGINE, **API, **FLEET, **SHARED, **WORKER}
ON_API = FAMILIES.keys() - WORKER.keys()
ON_WORKER = {*WORKER, "memory", "store_seconds", "store_errors", "build_info"}


def operation_label(operation: str) -> str:
    """The label of a call of the object store."""
    return operation if operation in OPERATIONS else OTHER
