"""/healthz, /readyz, /metrics and /v1/limits."""

import httpx
from prometheus_client.parser import text_string_to_metric_families

from server.engine.fake import FakeEngine
from tests.server.api.conftest import System, until


def series(text: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_ready_says_what_it_looked_at(http: httpx.Client) -> None:
    answer = http.get("/readyz")
    assert answer.status_code == 200
    assert answer.json()["checks"] == {"accepting": True, "engine": True, "control_store": True}


def test_metrics_count_what_happened(http: httpx.Client, system: System) -> None:
    before = series(http.get("/metrics").text)
    for body in ({"model": "toy", "prompt": "x"}, {"model": "nobody", "prompt": "x"}):
        http.post("/v1/completions", json=body)

    def grown(name: str, **labels: str) -> float:
        vllm = {"model_name": system.settings.base_id, "engine": "0"} if name.startswith("vllm:") else {}
        key = (name, tuple(sorted((vllm | labels).items())))
        return series(http.get("/metrics").text)[key] - before.get(key, 0)

    def requests(route: str, status: str) -> float:
        return grown("polypeft_http_requests_total", route=route, status=status, tenant_class="standard")

    http.get("/v1/adapters/x")
    http.get("/v1/models/a/b")
    assert requests("/v1/adapters/{name}", "404") == 1
    assert requests("/v1/models/{model:path}", "404") == 1
    route = "/v1/completions"
    assert requests(route, "200") == 1
    assert requests(route, "404") == 1
    assert grown("vllm:request_success_total", finished_reason="length") == 1
    assert grown("vllm:time_to_first_token_seconds_count") == 1
    assert grown("vllm:inter_token_latency_seconds_count") == 15
    assert grown("vllm:e2e_request_latency_seconds_count") == 1
    until(lambda: grown("vllm:generation_tokens_total") == 16)


def test_nothing_a_caller_chooses_becomes_a_series(http: httpx.Client, key: str, system: System) -> None:
    http.get("/v1/models/warm-up")
    before = len(series(http.get("/metrics").text))
    for i in range(50):
        http.get(f"/v1/models/random-{i}", headers={"x-request-id": f"id-{i}"})
        http.get(f"/nowhere/random-{i}")
        http.post("/v1/completions", json={"model": f"random-{i}", "prompt": "the prompt"})
    text = http.get("/metrics").text
    assert len(series(text)) - before <= 10
    for secret in (key, system.operator, "random-", "the prompt"):
        assert secret not in text


def test_limits_are_data(http: httpx.Client, engine: FakeEngine) -> None:
    limits = http.get("/v1/limits").json()
    assert limits["max_context_tokens"] == 256
    assert limits["max_n"] == 8
    too_many = {"model": "toy", "prompt": "x", "n": limits["max_n"] + 1}
    assert http.post("/v1/completions", json=too_many).status_code == 422
    assert http.post("/v1/completions", json=too_many | {"n": limits["max_n"]}).status_code == 200
