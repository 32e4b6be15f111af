"""/v1/usage and /admin/usage over a whole API: what a client counted is what the ledger says."""

import csv
import io
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import openai
import pytest
from redis import Redis as SyncRedis

from server.usage.record import Amounts
from tests.server.api.conftest import System, started, upload
from tests.waiting import until

PROMPT = "What is the capital of France?"


@pytest.fixture(scope="module")
def system(valkey_url: str) -> Iterator[System]:
    with started(valkey_url, max_n=4) as it:
        yield it


@pytest.fixture
def key(system: System, request: pytest.FixtureRequest) -> str:
    """Of a tenant of this test's own."""
    return system.tenant(request.node.name[:40])


@pytest.fixture
def http(system: System, key: str) -> Iterator[httpx.Client]:
    with system.http(key) as client:
        yield client


def ask(http: httpx.Client, model: str = "toy", **fields: Any) -> dict[str, int]:
    """The usage that the client is told."""
    asked = {"model": model, "prompt": PROMPT, "max_tokens": 4} | fields
    answer = http.post("/v1/completions", json=asked)
    assert answer.status_code == 200, answer.text
    usage: dict[str, int] = answer.json()["usage"]
    return usage


def results(http: httpx.Client, path: str = "/v1/usage", **params: Any) -> list[dict[str, Any]]:
    """All of today's."""
    answer = http.get(path, params=params)
    assert answer.status_code == 200, answer.text
    return [result for bucket in answer.json()["data"] for result in bucket["results"]]


def told(usages: list[dict[str, Any]]) -> tuple[int, int, int]:
    return (
        len(usages),
        sum(usage["prompt_tokens"] for usage in usages),
        sum(usage["completion_tokens"] for usage in usages),
    )


def counted(result: dict[str, Any]) -> tuple[int, int, int]:
    return result["num_model_requests"], result["input_tokens"], result["output_tokens"]


def test_the_sums_are_what_the_client_was_told(http: httpx.Client) -> None:
    usages = [ask(http), ask(http, n=3), ask(http, prompt=[PROMPT, "x" * 40], max_tokens=7)]
    [result] = results(http)
    assert counted(result) == told(usages)
    assert result["input_cached_tokens"] == sum(
        usage["prompt_tokens_details"]["cached_tokens"]  # type: ignore[index]
        for usage in usages
    )
    assert result["object"] == "organization.usage.completions.result"
    assert result["request_seconds"] > 0
    assert [result[name] for name in ("project_id", "model", "api_key_id")] == [None] * 3


def test_a_stream_counts_before_its_last_chunk(system: System, key: str, http: httpx.Client) -> None:
    with openai.OpenAI(base_url=f"{system.url}/v1", api_key=key, max_retries=0) as sdk:
        stream = sdk.completions.create(model="toy", prompt=PROMPT, max_tokens=5, stream=True)
        for chunk in stream:
            if chunk.choices[0].finish_reason:
                break
        [result] = results(http)
        assert (result["num_model_requests"], result["output_tokens"]) == (1, 5)
        stream.close()


def test_openais_own_client_and_names(system: System, key: str, http: httpx.Client) -> None:
    ask(http)
    start = int(time.time()) - 86_400
    with openai.OpenAI(base_url=f"{system.url}/v1", api_key=key, max_retries=0) as sdk:
        page = sdk.get(
            "/organization/usage/completions",
            cast_to=dict[str, Any],
            options={"params": {"start_time": start, "group_by": ["model", "api_key_id"]}},
        )
    assert page["object"] == "page"
    assert [bucket["object"] for bucket in page["data"]] == ["bucket"] * 2
    assert page["data"][-1]["end_time"] - page["data"][-1]["start_time"] == 86_400
    [result] = page["data"][-1]["results"]
    assert result["model"] == "toy"
    assert result["api_key_id"].startswith("key_")


def test_adapters_and_keys_are_told_apart(system: System, http: httpx.Client, key: str) -> None:
    upload(http, "poet")
    [tenant] = [one["id"] for one in _tenants(system) if one["name"].startswith("test_adapters_and_keys")]
    with system.http(system.operator) as operator:
        second = operator.post(f"/admin/tenants/{tenant}/keys").json()
    ask(http)
    ask(http, "poet")
    with system.http(second["secret"]) as other:
        ask(other, "poet@1")
        ask(other, "poet", n=2)
    by_adapter = {result["model"]: result["num_model_requests"] for result in results(http, group_by="model")}
    assert by_adapter == {"toy": 1, "poet@1": 3}
    by_key = {r["api_key_id"]: r["output_tokens"] for r in results(http, group_by="key")}
    assert by_key[second["id"]] == 12
    assert len(by_key) == 2
    assert len(results(http, group_by="adapter,key")) == 3
    [one] = results(http, key=second["id"])
    assert one["num_model_requests"] == 2
    [one] = results(http, adapter="toy")
    assert one["num_model_requests"] == 1


def test_requests_that_fail_or_are_left_count_what_was_made(
    system: System, http: httpx.Client, engine: Any
) -> None:
    engine.behaviour.fail_digest = upload(http, "broken").json()["digest"]
    engine.behaviour.fail_after = 2
    assert http.post("/v1/completions", json={"model": "broken", "prompt": "x"}).status_code == 500
    engine.behaviour.fail_digest = None
    engine.behaviour.step_seconds = 0.02
    asked = {"model": "toy", "prompt": PROMPT, "max_tokens": 200, "stream": True}
    with http.stream("POST", "/v1/completions", json=asked) as answer:
        next(answer.iter_lines())
    until(lambda: sum(r["requests"] for r in results(http)) == 2)
    [result] = results(http)
    assert (result["failed_requests"], result["cancelled_requests"]) == (1, 1)
    assert 3 <= result["output_tokens"] < 200


def test_what_is_refused_at_the_door_is_no_request(http: httpx.Client) -> None:
    for body in ({"model": "nobody", "prompt": "x"}, {"model": "toy", "prompt": "x", "n": 100}):
        assert http.post("/v1/completions", json=body).status_code in {400, 404}
    assert results(http) == []


def test_another_tenants_usage_is_nobodys(system: System, http: httpx.Client) -> None:
    ask(http)
    [mine] = results(http, group_by="key")
    with system.http(system.tenant("stranger")) as other:
        assert results(other, group_by="key") == []
        assert results(other, key=mine["api_key_id"]) == []
        assert other.get("/admin/usage").status_code == 403
        assert other.get("/v1/usage", params={"group_by": "tenant"}).status_code == 400
    assert httpx.get(f"{system.url}/v1/usage").status_code == 401


def test_the_operator_sees_all(system: System, http: httpx.Client) -> None:
    ask(http)
    [tenant] = [one["id"] for one in _tenants(system) if one["name"] == "test_the_operator_sees_all"]
    with system.http(system.operator) as operator:
        before = {r["project_id"]: counted(r) for r in results(operator, "/admin/usage", group_by="tenant")}
        [all_of_them] = results(operator, "/admin/usage")
        assert counted(all_of_them) == tuple(map(sum, zip(*before.values(), strict=True)))
        [its] = results(operator, "/admin/usage", tenant=tenant, group_by="adapter")
        assert (its["project_id"], its["num_model_requests"]) == (tenant, 1)
        assert operator.get("/admin/usage", params={"tenant": "ten_nobody"}).status_code == 404
        assert results(operator, "/admin/usage", tenant="operator") == []


def test_pages_have_every_day_once(system: System, http: httpx.Client) -> None:
    with SyncRedis.from_url(str(system.settings.redis_url)) as redis:
        [tenant] = [one["id"] for one in _tenants(system) if one["name"] == "test_pages_have_every_day_once"]
        today = int(time.time() // 86_400)
        for back in range(0, 40, 3):
            redis.hset(f"pp:usage:{today - back}:{tenant}", "poet@1 key_1", f"{back + 1}")
            redis.sadd(f"pp:usage:{today - back}", tenant)
    start = (datetime.now(UTC) - timedelta(days=39)).date().isoformat()
    for path, key_of, extra in (("/v1/usage", None, {}), ("/admin/usage", "", {"tenant": tenant})):
        with system.http(system.operator) if key_of is not None else system.http() as client:
            client.headers.setdefault("authorization", http.headers["authorization"])
            seen, page = [], {"start": start, "limit": 9, **extra}
            while page:
                found = client.get(path, params=page).json()
                seen += found["data"]
                page = {"start": start, "limit": 9, **extra, "page": found["next_page"]}
                if not found["has_more"]:
                    break
        assert [bucket["start_time"] // 86_400 for bucket in seen] == list(range(today - 39, today + 1))
        used = [result["requests"] for bucket in seen for result in bucket["results"]]
        assert used == [back + 1 for back in range(39, -1, -3)]


def test_a_page_of_many_tenants_ends_early_and_goes_on(
    system: System, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.usage.report.MAX_ROWS", 5)
    day = 10_000
    with SyncRedis.from_url(str(system.settings.redis_url)) as redis:
        for number in range(12):
            tenant = f"ten_{number:02}"
            redis.sadd(f"pp:usage:{day}", tenant)
            redis.hset(f"pp:usage:{day}:{tenant}", mapping={"a@1 k": "1", "b@1 k": "2"})
    params: dict[str, str] = {"start": "1997-05-19", "end": "1997-05-20", "group_by": "adapter"}
    found: list[tuple[str, str, int]] = []
    pages = 0
    with system.http(system.operator) as operator:
        while params:
            page = operator.get("/admin/usage", params=params).json()
            pages += 1
            found += [
                (r["project_id"], r["model"], r["requests"]) for b in page["data"] for r in b["results"]
            ]
            params = params | {"page": page["next_page"]} if page["has_more"] else {}
    assert pages == 4
    assert found == [(f"ten_{n:02}", f"{a}@1", i) for n in range(12) for i, a in ((1, "a"), (2, "b"))]


@pytest.mark.parametrize(
    "params",
    [
        {"start": "yesterday"},
        {"start": "2026-13-01"},
        {"start": "2026-11-02", "end": "2026-11-01"},
        {"start_time": "0", "end_time": str(86_400 * 1_000_000)},
        {"group_by": "user_id"},
        {"group_by": ["adapter"] * 20},
        {"limit": "0"},
        {"limit": "x"},
        {"page": "1970-01-01"},
        {"bucket_width": "1m"},
        {"format": "xml"},
    ],
)
def test_bad_input_gets_a_sentence(http: httpx.Client, params: dict[str, Any]) -> None:
    answer = http.get("/v1/usage", params=params)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"]


def test_csv_has_the_same_and_no_formula(system: System, http: httpx.Client) -> None:
    ask(http)
    with SyncRedis.from_url(str(system.settings.redis_url)) as redis:
        [tenant] = [
            one["id"] for one in _tenants(system) if one["name"] == "test_csv_has_the_same_and_no_formula"
        ]
        for name in ("=1+1", "+1", "-1", "@x"):
            redis.hset(f"pp:usage:{int(time.time() // 86_400)}:{tenant}", f"{name} k", "1")
    asked = {"group_by": "adapter", "start": datetime.now(UTC).date().isoformat()}
    by_format = http.get("/v1/usage", params=asked | {"format": "csv"})
    by_accept = http.get("/v1/usage", params=asked, headers={"accept": "text/csv"})
    assert by_format.text == by_accept.text
    assert by_format.headers["content-type"].startswith("text/csv")
    rows = list(csv.DictReader(io.StringIO(by_format.text)))
    assert {row["adapter"] for row in rows} == {"toy", "'=1+1", "'+1", "'-1", "'@x"}
    [base] = [row for row in rows if row["adapter"] == "toy"]
    [result] = [one for one in results(http, **asked) if one["model"] == "toy"]
    for name in Amounts._fields:
        name = name.replace("_ms", "_seconds")
        assert float(base[name]) == result[name]


def _tenants(system: System) -> list[dict[str, Any]]:
    with system.http(system.operator) as operator:
        found: list[dict[str, Any]] = operator.get("/admin/tenants").json()["data"]
    return found
