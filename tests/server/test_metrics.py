"""The engine's figures, folded into one registry."""

from server.engine.messages import Stats
from server.metrics import Metrics


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(name, labels)


def test_counters_go_on_across_an_engines_restart() -> None:
    metrics = Metrics()
    for boot, count in (("a", 5), ("a", 7), ("b", 2), ("b", 3)):
        metrics.absorb(Stats(boot, {}, {"generation_tokens": count}, []))
    assert value(metrics, "vllm:generation_tokens_total") == 10
    assert value(metrics, "polypeft_engine_restarts_total") == 1


def test_gauges_are_set_by_tier_and_unknown_keys_are_ignored() -> None:
    metrics = Metrics()
    gauges = {"running": 3.0, "kv_usage": 0.5, "ram_bytes": 10.0, "slots_total": 64.0, "surprise": 1.0}
    metrics.absorb(Stats("a", gauges, {"surprise": 1}, [("surprise", "x", 1.0)]))
    assert value(metrics, "vllm:num_requests_running") == 3
    assert value(metrics, "vllm:kv_cache_usage_perc") == 0.5
    assert value(metrics, "polypeft_adapter_bytes", tier="ram") == 10
    labels = {"max_lora": "64", "running_lora_adapters": "", "waiting_lora_adapters": ""}
    assert value(metrics, "vllm:lora_requests_info", **labels) is not None
    assert b"surprise" not in metrics.render()


def test_observations_reach_their_histogram() -> None:
    metrics = Metrics()
    observations = [
        ("adapter_load_seconds", "disk", 0.02),
        ("batch_rows", "", 4.0),
        ("batch_tokens", "", 9.0),
    ]
    metrics.absorb(Stats("a", {}, {}, [*observations, ("adapter_load_seconds", "a tenant's name", 1.0)]))
    assert value(metrics, "polypeft_adapter_load_seconds_count", tier="disk") == 1
    assert value(metrics, "polypeft_batch_rows_sum") == 4
    assert value(metrics, "polypeft_batch_tokens_sum") == 9
    assert b"a tenant's name" not in metrics.render()
