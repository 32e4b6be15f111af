"""Every Prometheus metric of the system: declarations only. vLLM's name where it means the same.

To add one, declare it in a table below or in engine_names.py, under a key; then give that key its values,
where the table says:

    ENGINE   events, as they happen: `count` and `observe` of EngineMetrics (engine/metrics/counters.py).
             States, and counts that a component keeps itself: read once a second by engine/snapshot.py
    API      `count` and `observe` of Metrics (metrics/exposition.py), which handlers have as deps.metrics
    FLEET    read from Valkey at a scrape: api/cluster_metrics.py
    SHARED   of several kinds of process: at the places of ENGINE, API and WORKER
    WORKER   finetune/worker/metrics.py

Each label has its values in labels.py, or is bounded otherwise (`OPEN` there): no request adds a series.
docs.py makes the tables of docs/metrics.md of these; a test compares them.
"""

from collections.abc import Mapping

from server.metrics.engine_names import ENGINE
from server.metrics.family import CALLS, ROUTES, SECONDS, Family, counter, gauge, histogram
from server.metrics.labels import CLASSES, FINISHED, OPERATIONS, OUTCOMES, PROCESSES, RATES, REJECTIONS

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
        "Generations refused at the door; deadline: the wait would be longer; quota: any request beyond a "
        "tenant's limit",
        reason=REJECTIONS,
    ),
    "rate_limited": counter("polypeft_rate_limited", "Refused by a tenant's rate limits", limit=RATES),
    "ledger_lag": gauge(
        "polypeft_ledger_lag_seconds", "Age of the oldest record of usage that Valkey does not have"
    ),
    "ledger_pending": gauge("polypeft_ledger_pending_records", "Records of usage that Valkey does not have"),
    "ledger_lost": counter(
        "polypeft_ledger_lost_records", "Records of usage for which there was no room while Valkey was away"
    ),
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
