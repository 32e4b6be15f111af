"""/metrics of a whole system under real traffic: everything documented is there, true, and never falls.

And its log: no key and no prompt, whatever went wrong.
"""

import socket
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from server.metrics.names import FAMILIES, ON_API, ON_WORKER
from tests.e2e.conftest import OPTIONS
from tests.e2e.serving import Serving, ask, body, files_of, push
from tests.e2e.test_finetune import create, data, ended
from tests.fixtures.models import load_model, make_lora
from tests.waiting import until

Lora = Callable[[int], Path]
Page = dict[tuple[str, frozenset[tuple[str, str]]], float]
CANARY = "the patient is called Zanzibar"
# no family but these may be without a series, or all 0, after the traffic of `busy`
EMPTY = {"gpu_memory"}
QUIET = {
    "preemptions",
    "guessed_tokens",  # it depends on what the tiny model says
    "guessed_right",
    "adapter_corrupt_copies",
    "non_finite_rows",
    "internal_errors",
    "engine_restarts",
    "rejections",
    "valkey_errors",
    "fairness_gap",  # nobody waits beside another; tests/server/engine/scheduling/test_fairness_bound.py
    "ledger_lag",  # records wait a moment
    "ledger_pending",
    "ledger_lost",
    "store_errors",
    "adapter_load_failures",  # nothing fails here; tests/server/engine/metrics/test_counters.py
    "adapter_failures",
    "adapter_wait_seconds",  # a row is in line for less time than a load from RAM takes
    "store_breaker",
    "kv_usage",
    "running",
    "waiting",
    "waiting_by_reason",
    "jobs",
    "job_silence",
}


@pytest.fixture(scope="module")
def port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
    return port


@pytest.fixture(scope="module")
def server(tiny: Path, tmp_path_factory: pytest.TempPathFactory, port: int) -> Iterator[Serving]:
    labels = ("--metrics-adapter-labels", "names", "--metrics-top", "4", "--metrics-port", str(port))
    options = (*OPTIONS, *labels, "--adapter-slots", "2", "--adapter-ram-bytes", str(1 << 20))
    it = Serving(str(tiny), tmp_path_factory.mktemp("metrics"), *options)
    try:
        it.start()
        yield it
        it.stop()
    finally:
        it.end()


def page(server: Serving) -> Page:
    """Every series; the parser refuses what Prometheus would."""
    answer = server.get("/metrics", server.operator)
    assert answer.status_code == 200
    return parsed(answer.text)


def parsed(text: str) -> Page:
    found: Page = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            key = (sample.name, frozenset(sample.labels.items()))
            assert key not in found, f"{key} stands twice"
            found[key] = sample.value
    return found


def total(found: Page, name: str, **labels: str) -> float:
    return sum(value for (each, has), value in found.items() if each == name and labels.items() <= has)


def series_of(found: Page, key: str) -> list[float]:
    family = FAMILIES[key]
    name = f"{family.name}_count" if family.kind == "histogram" else family.shown
    return [value for (each, _), value in found.items() if each == name]


@pytest.fixture(scope="module")
def busy(server: Serving, lora: Lora, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Two tenants' traffic, good and bad, and a job; a tenant's key."""
    keys = [server.tenant(name) for name in ("alice", "bob")]
    noop = make_lora(
        load_model(tiny), tmp_path_factory.mktemp("noop"), scale=0.0, r=2, target_modules=["q_proj"]
    )
    with server.http(keys[0]) as http:
        for seed in range(4):
            push(http, f"poet-{seed}", lora(seed))
        for seed in (0, 1, 2, 3, 0, 1, 2, 3):
            ask(http, f"poet-{seed}", CANARY, 4)
        refused = http.post("/v1/adapters", data={"name": "noop"}, files=files_of(noop))
        assert refused.status_code == 400, refused.text
    with server.http(keys[1]) as http:
        push(http, "poet-1", lora(5))
        for _ in range(2):  # the second finds its prefix
            ask(http, "llama", CANARY * 20)
        stream = body("poet-1", CANARY, 8, stream=True, n=2)
        assert http.post("/v1/completions", json=stream).text.endswith("data: [DONE]\n\n")
        long = body("llama", CANARY, 400)
        late = http.post("/v1/completions", json=long, headers={"x-request-timeout": "0.01"})
        assert late.status_code == 504
        with http.stream("POST", "/v1/completions", json=long | {"stream": True}) as gone:
            next(gone.iter_lines())
    with server.http(keys[0]) as http:
        http.delete("/v1/adapters/poet-3")
    with server.sdk(keys[1]) as sdk:
        file = sdk.files.create(file=("data.jsonl", data()), purpose="fine-tune")
        assert ended(sdk, server, create(sdk, file.id, "lora", r=4)).status == "succeeded"
    with server.http(server.operator) as http:
        [bob] = [one["id"] for one in http.get("/admin/tenants").json()["data"] if one["name"] == "bob"]
        http.put(f"/admin/tenants/{bob}/limits", json={"tokens_per_minute": 10})
    with server.http(keys[1]) as http:
        assert http.post("/v1/completions", json=long).status_code == 429
    return keys[0]


@pytest.mark.timeout(600)
def test_everything_documented_is_there_after_real_traffic(server: Serving, busy: str) -> None:
    until(lambda: total(page(server), "polypeft_training_attempts_total", outcome="finished") == 1)
    until(lambda: total(page(server), "polypeft_adapters_registered") == 5)  # they are counted now and then
    found = page(server)
    missing = [key for key in ON_API - EMPTY if not series_of(found, key)]
    assert not missing
    silent = [key for key in ON_API - EMPTY - QUIET if not any(series_of(found, key))]
    assert not silent
    assert total(found, "polypeft_tenants") == 2
    assert total(found, "polypeft_jobs_finished_total", status="succeeded") == 1
    assert total(found, "polypeft_gate_refusals_total", reason="no_effect") == 1
    assert total(found, "polypeft_adapter_cache_evictions_total", tier="device") > 4
    assert total(found, "vllm:prefix_cache_hits_total") > 0
    phases = {
        phase: total(found, "polypeft_step_seconds_sum", phase=phase) for phase in ("forward", "sample")
    }
    assert phases["forward"] > phases["sample"] > 0


def test_the_ledger_has_the_tokens_that_were_trained(server: Serving, busy: str) -> None:
    with server.http(server.operator) as http:
        usage = http.get("/admin/usage").json()
    [sums] = [result for bucket in usage["data"] for result in bucket["results"]]
    until(lambda: total(page(server), "polypeft_training_tokens_total") == sums["training_tokens"] > 0)
    assert (sums["jobs"], sums["failed_jobs"], sums["cancelled_jobs"]) == (1, 0, 0)


def test_names_are_the_operators_and_bounded(server: Serving, busy: str) -> None:
    assert server.get("/metrics").status_code == 401
    assert server.get("/metrics", busy).status_code == 401
    found = page(server)
    tenants = {dict(has)["tenant"] for name, has in found if name == "polypeft_tenant_requests_total"}
    adapters = {dict(has)["adapter"] for name, has in found if name == "polypeft_adapter_requests_total"}
    assert len(tenants) == 3
    assert "other" in tenants
    assert len(adapters) <= 5
    assert any(name.startswith("poet-") for name in adapters)
    text = server.get("/metrics", server.operator).text
    for secret in (busy, server.operator, CANARY, "Zanzibar"):
        assert secret not in text


def test_the_worker_shows_its_own(server: Serving, busy: str, port: int) -> None:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        found = parsed(answer.read().decode())
    assert not [key for key in ON_WORKER - {"worker_loss"} if not series_of(found, key)]
    assert total(found, "polypeft_worker_attempts_total", outcome="finished") == 1
    for operation in ("download", "put"):  # the data; a checkpoint and the result
        assert total(found, "polypeft_store_call_seconds_count", process="worker", operation=operation) > 0
    everybody = page(server)
    for mine, all_workers in (
        ("polypeft_worker_training_tokens_total", "polypeft_training_tokens_total"),
        ("polypeft_worker_checkpoint_bytes_total", "polypeft_checkpoint_bytes_total"),
    ):
        assert total(found, mine) == total(everybody, all_workers) > 0


@pytest.mark.parametrize("victim", ["engine", "api"])
def test_no_counter_falls_when_a_process_is_killed(server: Serving, busy: str, victim: str) -> None:
    with server.http(busy) as http:
        ask(http, "poet-1", CANARY)
    until(lambda: total(page(server), "vllm:num_requests_running") == 0)
    before = page(server)
    pid = server.pid(victim)
    server.kill(victim)
    until(lambda: server.pid(victim) != pid)
    until(server.ready, server.log)
    with server.http(busy) as http:
        ask(http, "poet-1", CANARY)
    generated = "vllm:generation_tokens_total"
    until(lambda: total(page(server), generated) >= total(before, generated) + 16)
    after = page(server)
    kinds = ("_total", "_count", "_sum", "_bucket")
    counted = {key for key in before if key[0].endswith(kinds) and not key[0].endswith("slots_total")}
    fallen = {key: (before[key], after.get(key)) for key in counted if after.get(key, -1.0) < before[key]}
    assert not fallen
    restarts = "polypeft_engine_restarts_total"
    assert total(after, restarts) - total(before, restarts) == (victim == "engine")


def test_the_log_holds_no_key_and_no_prompt(server: Serving, busy: str) -> None:
    stranger = "pp-" + "Zanzibar" * 5 + "xyz"
    bad: list[bytes] = [
        b'{"model": "llama", "prompt": "' + CANARY.encode(),
        b'{"model": "llama", "prompt": ["' + CANARY.encode() + b'", 1]}',
        b'{"model": "' + CANARY.encode() + b'", "prompt": "x"}',
        b'{"model": "llama", "messages": [{"role": "' + CANARY.encode() + b'"}]}',
        b"\xff" + CANARY.encode(),
    ]
    with server.http(busy) as http:
        for raw in bad:
            for route in ("/v1/completions", "/v1/chat/completions"):
                answer = http.post(route, content=raw, headers={"content-type": "application/json"})
                assert 400 <= answer.status_code < 500
        http.post("/v1/files", files={"file": ("x.jsonl", CANARY.encode())}, data={"purpose": "fine-tune"})
    assert server.get(f"/v1/models?key={busy}", stranger).status_code == 401
    said = server.log()
    assert len(said.splitlines()) > 10, "it logs, at debug"
    for secret in (busy, busy[3:], server.operator, stranger, CANARY, "Zanzibar"):
        assert secret not in said
