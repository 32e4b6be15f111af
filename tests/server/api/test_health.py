"""/healthz, /readyz, /metrics and /v1/limits."""

from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from server.engine.fake import FakeEngine
from server.metrics.labels import REJECTIONS
from server.metrics.names import FAMILIES, ON_API
from tests.server.api.conftest import System, upload
from tests.waiting import until


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
    assert limits["max_rows_per_tenant"] == 8
    too_many = {"model": "toy", "prompt": "x", "n": limits["max_n"] + 1}
    assert http.post("/v1/completions", json=too_many).status_code == 400
    assert http.post("/v1/completions", json=too_many | {"n": limits["max_n"]}).status_code == 200


def test_every_documented_family_is_on_the_page(http: httpx.Client, system: System) -> None:
    http.post("/v1/completions", json={"model": "toy", "prompt": "x", "max_tokens": 3})
    text = http.get("/metrics").text
    page = series(text)
    assert len(page) == sum(not line.startswith("#") for line in text.splitlines()), "a series stands twice"
    for key in ON_API:
        assert f"# TYPE {FAMILIES[key].shown} {FAMILIES[key].kind}\n" in text
    values = {name: value for (name, _), value in page.items()}
    assert (
        values["polypeft_engine_up"] == values["polypeft_valkey_up"] == values["polypeft_valkey_aof_ok"] == 1
    )
    assert values["polypeft_tenants"] >= 1
    assert values["polypeft_valkey_call_seconds_count"] > 0
    assert values["polypeft_process_resident_memory_bytes"] > 1e6
    assert values["polypeft_http_requests_under_way"] == 1, "this one"


@pytest.mark.parametrize(
    "settings", [{"metrics_token": "a-token-of-16-letters"}, {"metrics_adapter_labels": "ids"}]
)
def test_a_page_that_names_somebody_or_is_closed_takes_a_key(
    system: System, key: str, monkeypatch: pytest.MonkeyPatch, settings: dict[str, str]
) -> None:
    closed = system.settings.model_copy(update=settings)
    monkeypatch.setattr(system.app.state.services, "settings", closed)
    for given in (None, key, "x" * 8192, "pp-" + "x" * 43):
        with system.http(given) as client:
            answer = client.get("/metrics")
            assert answer.status_code == 401
            assert answer.headers["www-authenticate"] == "Bearer"
    for given in (system.operator, settings.get("metrics_token", system.operator)):
        with system.http(given) as client:
            assert client.get("/metrics").status_code == 200
            assert client.get("/metrics", params={"token": given}).status_code == 200
    with system.http(settings.get("metrics_token")) as client:
        assert client.get("/v1/models").status_code == 401, "it opens nothing else"


def test_a_class_of_tenant_is_a_label_and_a_tenant_is_not(http: httpx.Client, system: System) -> None:
    http.get("/v1/limits")
    with system.http(system.operator) as client:
        client.get("/v1/limits")
        light = client.post("/admin/tenants", json={"name": "light", "weight": 0.5}).json()["key"]
        heavy = client.post("/admin/tenants", json={"name": "heavy", "weight": 4}).json()["key"]
    for given in (light, heavy, "pp-" + "x" * 43):
        with system.http(given) as client:
            client.get("/v1/limits")
    page = series(http.get("/metrics").text)
    seen = {dict(labels)["tenant_class"] for (name, labels) in page if name == "polypeft_http_requests_total"}
    assert seen == {"anonymous", "operator", "standard", "low", "high"}


def test_rows_that_end_early_count_as_what_they_are(http: httpx.Client, engine: FakeEngine) -> None:
    def count(name: str, **labels: str) -> float:
        page = series(http.get("/metrics").text)
        return sum(
            value
            for (found, has), value in page.items()
            if found == name and labels.items() <= dict(has).items()
        )

    ended = "vllm:request_success_total"
    before = {how: count(ended, finished_reason=how) for how in ("abort", "error")}
    engine.behaviour.step_seconds = 0.02
    body = {"model": "toy", "prompt": "x", "max_tokens": 200, "stream": True, "n": 2}
    with http.stream("POST", "/v1/completions", json=body) as answer:
        next(answer.iter_lines())
    until(lambda: count(ended, finished_reason="abort") == before["abort"] + 2)
    http.post("/v1/completions", json=body | {"stream": False}, headers={"x-request-timeout": "0.1"})
    assert count(ended, finished_reason="error") == before["error"] + 2
    assert count("polypeft_request_failures_total", code="deadline_exceeded") >= 1


def test_what_is_refused_at_the_door_counts_by_reason(system: System, engine: FakeEngine) -> None:
    def refused(reason: str) -> float:
        page = series(client.get("/metrics").text)
        name = "vllm:admission_rejections_total"
        return sum(
            value for (found, has), value in page.items() if found == name and ("reason", reason) in has
        )

    body = {"model": "toy", "prompt": "x", "n": 8, "max_tokens": 200}
    upload = {"filename": "x.jsonl", "purpose": "fine-tune", "bytes": 10, "mime_type": "text/jsonl"}
    with system.http(system.tenant("many")) as client, system.http(system.tenant("more")) as other:
        before = {reason: refused(reason) for reason in REJECTIONS}
        engine.behaviour.step_seconds = 0.05
        with ThreadPoolExecutor(2) as pool:
            answers = [pool.submit(who.post, "/v1/completions", json=body) for who in (client, other)]
            until(lambda: engine.running == 16)
            with system.http(system.tenant("late")) as late:
                assert late.post("/v1/completions", json=body).status_code == 503
            assert client.post("/v1/completions", json=body).status_code == 429
            engine.behaviour.step_seconds = 0
        assert [answer.result().status_code for answer in answers] == [200, 200]
        engine.behaviour.wait_seconds = 60
        timeout = {"x-request-timeout": "5"}
        assert client.post("/v1/completions", json=body, headers=timeout).status_code == 503
        engine.behaviour.wait_seconds = 0
        limit = system.settings.max_uploads_per_tenant
        assert [client.post("/v1/uploads", json=upload).status_code for _ in range(limit + 1)][-1] == 429
        system.app.state.services.draining = True
        try:
            assert client.post("/v1/completions", json=body).status_code == 503
        finally:
            system.app.state.services.draining = False
        after = {reason: refused(reason) - before[reason] for reason in REJECTIONS}
    once = dict.fromkeys(("queue_full", "deadline", "draining"), 1)
    assert after == once | {"quota": 2, "engine_unavailable": 0}


def test_a_queue_that_other_processes_filled_is_a_refusal_not_a_failure(
    system: System, http: httpx.Client, engine: FakeEngine
) -> None:
    engine.behaviour.fail_digest = upload(http, "crowded").json()["digest"]
    engine.behaviour.error = ("queue_full", "The queue is full.")
    names = {
        "refused": ("vllm:admission_rejections_total", ("reason", "queue_full")),
        "failed": ("polypeft_request_failures_total", ("code", "queue_full")),
        "ended": ("vllm:request_success_total", ("finished_reason", "error")),
    }

    def counts() -> dict[str, float]:
        page = series(http.get("/metrics").text)
        return {
            key: sum(value for (found, has), value in page.items() if found == name and label in has)
            for key, (name, label) in names.items()
        }

    before = counts()
    body = {"model": "crowded", "prompt": "x", "n": 2, "stream": True}
    answer = http.post("/v1/completions", json=body)
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "queue_full")
    assert counts() == before | {"refused": before["refused"] + 1}


def test_a_silent_engine_is_not_ready_and_hangs_only_beyond_any_request(
    system: System, engine: FakeEngine, http: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What comes meanwhile is taken, and waits; only an engine that nobody could end fails the probe."""
    engine.behaviour.mute = True
    monkeypatch.setattr("server.engine.client.SILENCE_SECONDS", 0.5)
    until(lambda: http.get("/readyz").status_code == 503)
    told = http.get("/readyz").json()
    assert told["checks"] == {"accepting": True, "engine": False, "control_store": True}
    assert told["engine"]["silent_seconds"] >= 0.5
    assert http.get("/healthz").status_code == 200
    body = {"model": "toy", "prompt": "x", "max_tokens": 4}
    late = http.post("/v1/completions", json=body, headers={"x-request-timeout": "0.5"})
    assert late.status_code == 504
    with monkeypatch.context() as brief:
        brief.setattr("server.api.routes.health.HUNG_AFTER_TIMEOUTS", 0.0001)  # of ten minutes
        answer = http.get("/healthz")
        assert (answer.status_code, answer.json()["status"]) == (503, "hangs")
    engine.behaviour.mute = False
    until(lambda: http.get("/readyz").status_code == 200)
    assert http.get("/healthz").status_code == 200
    assert http.post("/v1/completions", json=body).status_code == 200
