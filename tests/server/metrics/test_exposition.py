"""The page of /metrics: whose figures it shows, in what form, and that several processes add up."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from server.messages import Stats
from server.metrics import Metrics
from server.metrics.names import FAMILIES, ON_API
from server.settings import MULTIPROCESS, inherited_environment

VLLM = {"model_name": "toy", "engine": "0"}
PROCESS = """
import sys
from server.messages import Stats
from server.metrics import Metrics
from server.settings import multiprocess_dir
metrics = Metrics("toy", multiprocess_dir())
for _ in range(int(sys.argv[1])):
    metrics.count("http_requests", "/x", "200", "standard")
    metrics.observe("first_token", 0.3)
metrics.opened(1)
metrics.absorb(Stats("boot", {"running": 3.0}, {"generation_tokens": 50.0}))
print(metrics.render().decode() , flush=True)
sys.stdin.read()
"""


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    base = VLLM if name.startswith("vllm:") else {}
    return metrics.registry.get_sample_value(name, base | labels)


def samples(text: str) -> dict[tuple[str, str], float]:
    """(name, labels as JSON) -> value; the parser refuses what Prometheus would."""
    found: dict[tuple[str, str], float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            key = (sample.name, json.dumps(sample.labels, sort_keys=True))
            assert key not in found, f"{key} stands twice"
            found[key] = sample.value
    return found


def full() -> Stats:
    """Figures with something of every kind."""
    return Stats(
        "boot",
        {"running": 3.0, "kv_usage": 0.5, "surprise": 1.0},
        {"generation_tokens": 50.0, "surprise": 1.0},
        [
            ("adapter_bytes", ("ram",), 10.0),
            ("memory", ("engine",), 1e6),
            ("lora_info", ("64", "poet", ""), 1.7e9),
            ("tenant_requests", ("ten_1",), 2.0),
            ("surprise", ("x",), 1.0),
        ],
        [("adapter_load_seconds", ("disk",), [0, 0, 1] + [0] * 14, 0.02)],
    )


def test_the_engines_figures_are_shown_as_they_are() -> None:
    metrics = Metrics("toy")
    for _ in range(2):  # told twice, they count once
        metrics.absorb(full())
    assert value(metrics, "vllm:num_requests_running") == 3
    assert value(metrics, "vllm:generation_tokens_total") == 50
    assert value(metrics, "polypeft_adapter_bytes", tier="ram") == 10
    assert value(metrics, "polypeft_adapter_load_seconds_bucket", tier="disk", le="0.025") == 1
    assert value(metrics, "polypeft_adapter_load_seconds_bucket", tier="disk", le="0.01") == 0
    assert value(metrics, "polypeft_adapter_load_seconds_sum", tier="disk") == 0.02
    info = {"max_lora": "64", "running_lora_adapters": "poet", "waiting_lora_adapters": ""}
    assert value(metrics, "vllm:lora_requests_info", **info) == 1.7e9
    assert value(metrics, "polypeft_process_resident_memory_bytes", process="engine") == 1e6
    assert (value(metrics, "polypeft_process_resident_memory_bytes", process="api") or 0) > 1e6
    assert b"surprise" not in metrics.render()


def test_every_family_is_there_and_every_known_series_begins_at_0() -> None:
    metrics = Metrics("toy")
    text = metrics.render().decode()
    for key in ON_API:
        assert f"# TYPE {FAMILIES[key].shown} {FAMILIES[key].kind}\n" in text
    assert samples(text)
    assert value(metrics, "polypeft_gate_refusals_total", reason="non_finite") == 0
    assert value(metrics, "polypeft_step_seconds_count", phase="adapter") == 0
    assert value(metrics, "vllm:request_success_total", finished_reason="abort") == 0
    assert "_created" not in text


def test_while_there_is_no_engine_its_gauges_are_0_and_its_counters_stand() -> None:
    metrics = Metrics("toy")
    metrics.absorb(full())
    metrics.engine_up = lambda: False
    assert value(metrics, "vllm:num_requests_running") == 0
    assert value(metrics, "polypeft_adapter_bytes", tier="ram") == 0
    assert value(metrics, "vllm:generation_tokens_total") == 50
    assert value(metrics, "polypeft_engine_up") == 0


def test_the_store_and_its_breaker_are_shown() -> None:
    metrics = Metrics("toy")
    metrics.breaker = lambda: "half-open"
    metrics.on_store_call("get", 0.2, "failed")
    metrics.on_store_call("a new kind", 0.2, "missing")
    metrics.absorb(full())
    calls = "polypeft_store_call_seconds_count"
    assert value(metrics, calls, process="api", operation="get") == 1
    assert value(metrics, calls, process="api", operation="other") == 1
    errors = {"process": "api", "operation": "get", "outcome": "failed"}
    assert value(metrics, "polypeft_store_errors_total", **errors) == 1
    assert value(metrics, "polypeft_store_breaker_open", process="api") == 1


def test_several_processes_add_up_also_those_that_are_gone(tmp_path: Path) -> None:
    environment = inherited_environment() | {MULTIPROCESS: str(tmp_path)}
    root = str(Path(__file__).resolve().parents[3])

    def start(count: int) -> "subprocess.Popen[str]":
        command = [sys.executable, "-c", PROCESS, str(count)]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        return subprocess.Popen(command, env=environment | {"PYTHONPATH": root}, cwd=root, **pipes)

    def page(process: "subprocess.Popen[str]") -> dict[tuple[str, str], float]:
        assert process.stdout is not None
        lines = iter(process.stdout.readline, "\n")
        return samples("".join(lines))

    requests = '{"route": "/x", "status": "200", "tenant_class": "standard"}'
    base = json.dumps(VLLM, sort_keys=True)
    first = start(3)
    assert page(first)["polypeft_http_requests_total", requests] == 3
    second = start(4)
    seen = page(second)
    assert seen["polypeft_http_requests_total", requests] == 7
    assert seen["vllm:time_to_first_token_seconds_count", base] == 7
    assert seen["polypeft_http_requests_under_way", "{}"] == 2
    assert seen["vllm:generation_tokens_total", base] == 50, "the engine's, seen by both"
    first.kill()
    first.wait()
    third = start(1)
    seen = page(third)
    for process in (second, third):
        process.communicate()
    assert seen["polypeft_http_requests_total", requests] == 8, "a counter never falls"
    assert seen["polypeft_http_requests_under_way", "{}"] == 2
    assert process.returncode == 0
    if first.stdout and first.stdin:
        first.stdout.close()
        first.stdin.close()
