"""Gauges, and the counts that components keep themselves, read once a second into a Stats message.

Events are counted as they happen, in engine/metrics/counters.py.
"""

import time

import torch

from server.engine.engine import Engine
from server.memory import resident_bytes
from server.messages import Stats
from server.metrics.labels import GATE_REFUSALS, OTHER, WAITS

# PolypeftError's code -> the reason in metrics
REFUSAL_REASONS = {"invalid_adapter": "invalid", "store_unavailable": "store"}


def stats(engine: Engine, boot: str) -> Stats:
    """All metrics of the engine; also written to disk for the next process."""
    engine.metrics.review(time.monotonic())
    engine.loader.disk_writer.free_disk_space()
    _copy_counts(engine)
    engine.load_records.write(engine.loader.take_loads())
    gauges = {
        "running": len(engine.scheduler.running),
        "waiting": engine.scheduler.waiting,
        "kv_usage": engine.blocks.usage,
        "fairness_gap": engine.scheduler.queues.relative_gap(),
        "slots_used": len(engine.cache.by_digest),
        "slots_total": engine.cache.slots,
    }
    return engine.metrics.report(boot, gauges, _labelled_gauges(engine))


def _labelled_gauges(engine: Engine) -> list[tuple[str, tuple[str, ...], float]]:
    cache, loader, metrics = engine.cache, engine.loader, engine.metrics
    waiting = [*engine.scheduler.queues]
    reasons = dict.fromkeys(WAITS, 0) | {"grammar": len(engine.admission.compiling)}
    for row in waiting:
        reasons[row.waits_for] += 1
    running = metrics.adapter_list([*engine.scheduler.running.values()])
    info = (str(cache.slots), running, metrics.adapter_list(waiting))
    return [
        *(("waiting_by_reason", (reason,), count) for reason, count in reasons.items()),
        ("adapter_bytes", ("device",), cache.nbytes),
        ("adapter_bytes", ("ram",), loader.ram.nbytes),
        ("adapter_bytes", ("disk",), loader.disk.nbytes),
        ("adapter_budget", ("device",), cache.budget),
        ("adapter_budget", ("ram",), loader.ram.budget),
        ("adapter_budget", ("disk",), loader.disk.index.max_bytes),
        ("adapters_resident", ("device",), len(cache.by_digest)),
        ("adapters_resident", ("ram",), len(loader.ram)),
        ("adapters_resident", ("disk",), len(loader.disk)),
        ("memory", ("engine",), resident_bytes()),
        ("store_breaker", ("engine",), float(loader.objects.breaker.state != "closed")),
        ("lora_info", info, time.time()),
        *_gpu_memory(),
    ]


def _copy_counts(engine: Engine) -> None:
    """Copy the counts that the components have kept since the process began."""
    metrics, cache, loader = engine.metrics, engine.cache, engine.loader
    for key, value in engine.counts.items():
        metrics.set_count(key, value)
    metrics.set_count("prefix_queries", engine.blocks.queries)
    metrics.set_count("prefix_hits", engine.blocks.hits)
    metrics.set_count("preemptions", engine.scheduler.preemptions)
    metrics.set_count("adapter_evictions", cache.evictions, "device")
    metrics.set_count("adapter_evictions", loader.ram.evictions, "ram")
    metrics.set_count("adapter_evictions", loader.disk.evictions, "disk")
    for tier, copies in loader.corrupt_copies.items():
        metrics.set_count("adapter_corrupt_copies", copies, tier)
    metrics.set_count("gate_accepted", engine.adapter_check.accepted)
    for reason in GATE_REFUSALS:
        codes = [code for code in engine.adapter_check.refusals if _refusal_reason(code) == reason]
        metrics.set_count("gate_refusals", sum(engine.adapter_check.refusals[code] for code in codes), reason)
    metrics.add_observations(engine.take_observations())


def _refusal_reason(code: str) -> str:
    reason = REFUSAL_REASONS.get(code, code)
    return reason if reason in GATE_REFUSALS else OTHER


def _gpu_memory() -> list[tuple[str, tuple[str, ...], float]]:
    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return []
    kinds = {
        "allocated": torch.cuda.memory_allocated(),
        "reserved": torch.cuda.memory_reserved(),
        "total": torch.cuda.mem_get_info()[1],
    }
    return [("gpu_memory", (kind,), value) for kind, value in kinds.items()]
