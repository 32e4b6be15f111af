"""The fleet: is it well, who waits, and for what?"""

from deploy.grafana.panels import NO_PROBES, Panel, gauge, mean, quantile, quantiles, rate, stat

HITS, MISSES = "polypeft_adapter_cache_hits_total", "polypeft_adapter_cache_misses_total"

FLEET: dict[str, list[Panel]] = {
    "Is it well?": [
        stat(
            "Engines up",
            "Servers whose engine answers. Should equal the number of servers.",
            "short",
            gauge("polypeft_engine_up"),
        ),
        stat(
            "Requests a second",
            "All requests but probes.",
            "reqps",
            rate("polypeft_http_requests_total", NO_PROBES),
        ),
        stat(
            "Server errors",
            "Share of requests that got a 5xx in 5 minutes; the objective is 0.1%.",
            "percentunit",
            "polypeft:http_errors:ratio_rate5m",
            (0.001, 0.0144),
        ),
        stat(
            "First token, p95",
            "19 of 20 requests get their first token sooner than this.",
            "s",
            "polypeft:time_to_first_token_seconds:p95_5m",
            (2.5, 5),
        ),
        stat(
            "Rows that wait",
            "Sequences that are not yet in the batch. Lasting: too little capacity.",
            "short",
            gauge("vllm:num_requests_waiting"),
            (16, 64),
        ),
        stat(
            "KV cache, fullest",
            "Fullest server. At 100% rows wait, or are put back.",
            "percentunit",
            gauge("vllm:kv_cache_usage_perc", over="max"),
            (0.85, 0.95),
        ),
    ],
    "Traffic": [
        Panel(
            "Requests by route",
            "What callers ask for.",
            "reqps",
            ((rate("polypeft_http_requests_total", NO_PROBES, "route"), "{{route}}"),),
        ),
        Panel(
            "Requests by status",
            "4xx: the caller's mistake or limit; 499: the caller left; 5xx: ours.",
            "reqps",
            ((rate("polypeft_http_requests_total", NO_PROBES, "status"), "{{status}}"),),
        ),
        Panel(
            "Requests by class of tenant",
            "A tenant's class goes by its weight.",
            "reqps",
            ((rate("polypeft_http_requests_total", NO_PROBES, "tenant_class"), "{{tenant_class}}"),),
        ),
        Panel(
            "Tokens",
            "Prompt tokens computed, and tokens generated.",
            "short",
            (
                (rate("vllm:prompt_tokens_total"), "prompt"),
                (rate("vllm:generation_tokens_total"), "generated"),
            ),
        ),
        Panel(
            "Answers by how they ended",
            "stop, length: whole; abort: the caller left; error: see Failures by code.",
            "reqps",
            ((rate("vllm:request_success_total", by="finished_reason"), "{{finished_reason}}"),),
        ),
        Panel(
            "Failures by code",
            "Generations that ended in an error, by the code in the error's body.",
            "reqps",
            ((rate("polypeft_request_failures_total", by="code"), "{{code}}"),),
        ),
        Panel(
            "Refused at the door",
            "Generations refused before they began: the queue is full, the server stops, its "
            "engine is down, or a tenant's quota is used up.",
            "reqps",
            ((rate("vllm:admission_rejections_total", by="reason"), "{{reason}}"),),
        ),
        Panel(
            "Requests under way",
            "Open HTTP requests, streams among them.",
            "short",
            ((gauge("polypeft_http_requests_under_way"), "open"),),
        ),
        Panel(
            "Time of a request by route, p95",
            "From arrival to the last byte.",
            "s",
            ((quantile(0.95, "polypeft_http_request_seconds", "route", NO_PROBES), "{{route}}"),),
        ),
    ],
    "Latency": [
        Panel(
            "Time to first token",
            "What a user waits before anything appears.",
            "s",
            quantiles("vllm:time_to_first_token_seconds"),
        ),
        Panel(
            "Time between tokens",
            "How fluently an answer flows.",
            "s",
            quantiles("vllm:inter_token_latency_seconds"),
        ),
        Panel(
            "Whole answer",
            "Arrival to last token; depends on how long answers are.",
            "s",
            quantiles("vllm:e2e_request_latency_seconds"),
        ),
        Panel(
            "Wait for the batch",
            "A row's time before its first step.",
            "s",
            quantiles("vllm:request_queue_time_seconds"),
        ),
        Panel(
            "Where a row waits",
            "Mean wait by reason. capacity: the batch or the KV cache is full; adapter: it is being "
            "loaded; sibling: n > 1; grammar: it is being compiled.",
            "s",
            ((mean("polypeft_request_wait_seconds", "reason"), "{{reason}}"),),
        ),
        Panel(
            "Prefill and decode, p95",
            "The two parts of computing an answer.",
            "s",
            (
                (quantile(0.95, "vllm:request_prefill_time_seconds"), "prefill"),
                (quantile(0.95, "vllm:request_decode_time_seconds"), "decode"),
            ),
        ),
    ],
    "Batch and memory": [
        Panel(
            "Rows",
            "In the batch, and waiting for it.",
            "short",
            (
                (gauge("vllm:num_requests_running"), "in the batch"),
                (gauge("vllm:num_requests_waiting"), "waiting"),
            ),
        ),
        Panel(
            "Rows in a step",
            "Mean. More rows a step is more throughput.",
            "short",
            ((mean("polypeft_batch_rows"), "rows"),),
        ),
        Panel(
            "Tokens in a step",
            "Mean: prompts' and answers' together.",
            "short",
            ((mean("vllm:iteration_tokens_total"), "tokens"),),
        ),
        Panel(
            "A step's time by phase",
            "Mean. adapter is part of forward, and measured in some steps only.",
            "s",
            ((mean("polypeft_step_seconds", "phase"), "{{phase}}"),),
        ),
        Panel(
            "KV cache in use",
            "Share of blocks that rows own. Near 100%: rows wait.",
            "percentunit",
            ((gauge("vllm:kv_cache_usage_perc", by="instance", over="max"), "{{instance}}"),),
        ),
        Panel(
            "Prefix cache",
            "Share of looked-up prompt tokens that need no computing.",
            "percentunit",
            (
                (
                    f"{rate('vllm:prefix_cache_hits_total')} / {rate('vllm:prefix_cache_queries_total')}",
                    "found",
                ),
            ),
        ),
        Panel(
            "Rows put back",
            "For want of KV; they are computed again later.",
            "short",
            ((rate("vllm:num_preemptions_total"), "rows a second"),),
        ),
        Panel(
            "Memory of processes",
            "Physical memory that each kind of process holds.",
            "bytes",
            ((gauge("polypeft_process_resident_memory_bytes", by="process"), "{{process}}"),),
        ),
        Panel(
            "GPU memory",
            "Of engines; empty on a CPU.",
            "bytes",
            ((gauge("polypeft_gpu_memory_bytes", by="kind"), "{{kind}}"),),
        ),
    ],
    "Adapters": [
        Panel(
            "Slots on the device",
            "Adapters ready to run, and room for them.",
            "short",
            (
                (gauge("polypeft_adapter_slots_used"), "used"),
                (gauge("polypeft_adapter_slots_total"), "slots"),
            ),
        ),
        Panel(
            "Hit ratio",
            "Share of rows whose adapter was on the device already.",
            "percentunit",
            ((f"{rate(HITS)} / ({rate(HITS)} + {rate(MISSES)})", "hits"),),
        ),
        Panel(
            "Load of an adapter, p95",
            "By where it was found. Cold ones come from the store.",
            "s",
            ((quantile(0.95, "polypeft_adapter_load_seconds", "tier"), "{{tier}}"),),
        ),
        Panel(
            "Loads",
            "A second, by where adapters were found.",
            "short",
            ((rate("polypeft_adapter_load_seconds_count", by="tier"), "{{tier}}"),),
        ),
        Panel(
            "Bytes loaded",
            "A second, by where adapters were found.",
            "Bps",
            ((rate("polypeft_adapter_load_bytes_total", by="tier"), "{{tier}}"),),
        ),
        Panel(
            "Evictions",
            "Adapters that made room for another, by the tier they left. Many: it is too small.",
            "short",
            ((rate("polypeft_adapter_cache_evictions_total", by="tier"), "{{tier}}"),),
        ),
        Panel(
            "Adapters held",
            "By tier; an adapter may be in several.",
            "short",
            ((gauge("polypeft_adapters_resident", by="tier"), "{{tier}}"),),
        ),
        Panel(
            "How full each tier is",
            "Bytes held over bytes allowed.",
            "percentunit",
            (
                (
                    f"{gauge('polypeft_adapter_bytes', by='tier')}"
                    f" / {gauge('polypeft_adapter_budget_bytes', by='tier')}",
                    "{{tier}}",
                ),
            ),
        ),
        Panel(
            "Load failures",
            "missing: deleted meanwhile; invalid: damaged in the store; store: no answer.",
            "short",
            ((rate("polypeft_adapter_load_failures_total", by="reason"), "{{reason}}"),),
        ),
        Panel(
            "New versions checked",
            "Uploads that passed the engine's check, and refused ones by reason.",
            "short",
            (
                (rate("polypeft_gate_accepted_total"), "accepted"),
                (rate("polypeft_gate_refusals_total", by="reason"), "refused: {{reason}}"),
            ),
        ),
        Panel(
            "Registered",
            "Of all tenants.",
            "short",
            (
                (gauge("polypeft_adapters_registered", over="max"), "adapters"),
                (gauge("polypeft_tenants", over="max"), "tenants"),
            ),
        ),
        Panel(
            "Damage",
            "Rows with NaN or Inf, and cached copies that did not match their SHA-256. Should stay 0.",
            "short",
            (
                (gauge("polypeft_non_finite_rows_total"), "rows"),
                (gauge("polypeft_adapter_corrupt_copies_total"), "copies"),
            ),
        ),
    ],
    "What it stands on": [
        Panel(
            "Valkey's calls, p95",
            "Tenants, keys and jobs live there.",
            "s",
            ((quantile(0.95, "polypeft_valkey_call_seconds"), "p95"),),
        ),
        Panel(
            "Valkey",
            "1: it answers, and can write its file. Errors are failed calls a second.",
            "short",
            (
                (gauge("polypeft_valkey_up", over="min"), "answers"),
                (gauge("polypeft_valkey_aof_ok", over="min"), "writes"),
                (rate("polypeft_valkey_errors_total"), "errors"),
            ),
        ),
        Panel(
            "Valkey's memory",
            "It must never be full: it evicts nothing.",
            "bytes",
            ((gauge("polypeft_valkey_memory_bytes", over="max"), "used"),),
        ),
        Panel(
            "Usage not yet added up",
            "Age of the oldest record, and records a second that are lost: both 0, or nearly.",
            "s",
            (
                (gauge("polypeft_ledger_lag_seconds", over="max"), "oldest"),
                (rate("polypeft_ledger_lost_records_total"), "lost"),
            ),
            limits=(10, 60),
        ),
        Panel(
            "Records of usage that wait",
            "In the API processes, for the next call of Valkey.",
            "short",
            ((gauge("polypeft_ledger_pending_records"), "waiting"),),
        ),
        Panel(
            "Object store's calls, p95",
            "Adapters, files and checkpoints live there.",
            "s",
            ((quantile(0.95, "polypeft_store_call_seconds", "operation"), "{{operation}}"),),
        ),
        Panel(
            "Object store's errors",
            "Failed calls a second, and whether calls are held back (1).",
            "short",
            (
                (rate("polypeft_store_errors_total", by="process"), "{{process}}"),
                (gauge("polypeft_store_breaker_open", by="process", over="max"), "held back: {{process}}"),
            ),
        ),
        Panel(
            "Engine restarts",
            "Since the server started. Each cost the rows in its batch.",
            "short",
            ((gauge("polypeft_engine_restarts_total", by="instance"), "{{instance}}"),),
        ),
    ],
}
