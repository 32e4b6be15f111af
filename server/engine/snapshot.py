"""The engine's state at one moment, and its parts' own counts, as figures."""

import time

import torch

from server.engine.engine import Engine
from server.memory import resident_bytes
from server.messages import Stats
from server.metrics.names import GATE_REFUSALS, OTHER, WAITS

# PolypeftError's code -> the reason in metrics
GATE_REASONS = {"invalid_adapter": "invalid", "store_unavailable": "store"}


def stats(engine: Engine, boot: str) -> Stats:
    """Everything for /metrics; also keeps it for the next engine."""
    engine.figures.review(time.monotonic())
    engine.loader.disk_writer.free_disk_space()
    _count(engine)
    gauges = {
        "running": len(engine.scheduler.running),
        "waiting": engine.scheduler.waiting,
        "kv_usage": engine.blocks.usage,
        "slots_used": len(engine.cache.by_digest),
        "slots_total": engine.cache.slots,
    }
    return engine.figures.report(boot, gauges, _labelled(engine))


def _labelled(engine: Engine) -> list[tuple[str, tuple[str, ...], float]]:
    cache, loader, figures = engine.cache, engine.loader, engine.figures
    waiting = [*engine.scheduler.queues]
    reasons = dict.fromkeys(WAITS, 0) | {"grammar": len(engine.admission.compiling)}
    for row in waiting:
        reasons[row.waits_for] += 1
    running = figures.listed([*engine.scheduler.running.values()])
    info = (str(cache.slots), running, figures.listed(waiting))
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
        *_gpu(),
    ]


def _count(engine: Engine) -> None:
    """What the parts have counted since the process began."""
    figures, cache, loader = engine.figures, engine.cache, engine.loader
    for key, value in engine.counts.items():
        figures.set_count(key, value)
    figures.set_count("prefix_queries", engine.blocks.queries)
    figures.set_count("prefix_hits", engine.blocks.hits)
    figures.set_count("preemptions", engine.scheduler.preemptions)
    figures.set_count("adapter_evictions", cache.evictions, "device")
    figures.set_count("adapter_evictions", loader.ram.evictions, "ram")
    figures.set_count("adapter_evictions", loader.disk.evictions, "disk")
    for tier, copies in loader.corrupt_copies.items():
        figures.set_count("adapter_corrupt_copies", copies, tier)
    figures.set_count("gate_accepted", engine.gate.accepted)
    for reason in GATE_REFUSALS:
        codes = [code for code in engine.gate.refusals if _gate_reason(code) == reason]
        figures.set_count("gate_refusals", sum(engine.gate.refusals[code] for code in codes), reason)
    figures.take(engine.take_observations())


def _gate_reason(code: str) -> str:
    reason = GATE_REASONS.get(code, code)
    return reason if reason in GATE_REFUSALS else OTHER


def _gpu() -> list[tuple[str, tuple[str, ...], float]]:
    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return []
    kinds = {
        "allocated": torch.cuda.memory_allocated(),
        "reserved": torch.cuda.memory_reserved(),
        "total": torch.cuda.mem_get_info()[1],
    }
    return [("gpu_memory", (kind,), value) for kind, value in kinds.items()]
