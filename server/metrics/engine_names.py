"""The engine's metrics: declarations, as in names.py, which says how to add one."""

from collections.abc import Mapping

from server.metrics.family import ROWS, SECONDS, SHORT, TOKENS, Family, counter, gauge, histogram
from server.metrics.labels import GATE_REFUSALS, LOAD_FAILURES, PHASES, SOURCES, TIERS, WAITS

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
    "fairness_gap": gauge(
        "polypeft_fairness_gap",
        "The largest difference of what two tenants with rows waiting have been served, over its bound "
        "(docs/fairness.md); above 1 only while memory is short",
    ),
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
