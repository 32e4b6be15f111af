"""Rate limits over HTTP: OpenAI's 429 and headers, which the unchanged SDK obeys; unused tokens come back."""

import math
import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any, NamedTuple

import httpx
import openai
import pytest

from server.api.http.rate_limits import duration
from server.engine.fake import Behaviour, FakeEngine
from tests.server.api.conftest import System
from tests.waiting import until

BODY = {"model": "toy", "prompt": [1, 2, 3, 4], "max_tokens": 6}  # takes 10 tokens


class Limited(NamedTuple):
    id: str
    key: str


@pytest.fixture
def limited(system: System, engine: FakeEngine) -> Callable[..., Limited]:
    def make(**limits: int) -> Limited:
        with system.http(system.operator) as operator:
            made = operator.post("/admin/tenants", json={"name": "limited"}).json()
            answer = operator.put(f"/admin/tenants/{made['id']}/limits", json=limits)
            assert answer.status_code == 200
        return Limited(made["id"], made["key"])

    return make


def ask(client: httpx.Client, **fields: Any) -> httpx.Response:
    return client.post("/v1/completions", json=BODY | fields)


def test_without_limits_there_is_no_header_and_no_key(system: System, http: httpx.Client) -> None:
    answer = ask(http)
    assert answer.status_code == 200
    assert not [name for name in answer.headers if "ratelimit" in name]
    assert system.call(system.app.state.services.redis.keys("pp:rates:*")) == []


def test_every_answer_says_what_is_left(system: System, limited: Callable[..., Limited]) -> None:
    with system.http(limited(requests_per_minute=60, tokens_per_minute=6000).key) as client:
        asked: tuple[dict[str, Any], ...] = ({}, {"stream": True}, {"n": 1.5})
        for number, fields in enumerate(asked, 1):
            answer = ask(client, **fields)
            assert answer.status_code == (400 if "n" in fields else 200)
            assert answer.headers["x-ratelimit-limit-requests"] == "60"
            assert answer.headers["x-ratelimit-limit-tokens"] == "6000"
            assert int(answer.headers["x-ratelimit-remaining-requests"]) in {60 - number, 61 - number}
            assert int(answer.headers["x-ratelimit-remaining-tokens"]) >= 5980
            for name in ("requests", "tokens"):
                assert re.fullmatch(
                    r"(\d+m)?(\d+(\.\d+)?s|\d+ms)", answer.headers[f"x-ratelimit-reset-{name}"]
                )


def test_past_the_limit_the_answer_is_openais(system: System, limited: Callable[..., Limited]) -> None:
    tenant = limited(requests_per_minute=2)
    with system.http(tenant.key) as client:
        answers = [ask(client) for _ in range(4)]
    assert [answer.status_code for answer in answers] == [200, 200, 429, 429]
    for answer in answers[2:]:
        error = answer.json()["error"]
        assert (error["type"], error["code"], error["param"]) == ("requests", "rate_limit_exceeded", None)
        assert re.fullmatch(
            rf"Rate limit reached.* in organization {tenant.id} on requests per min \(RPM\): "
            r"Limit 2, Used 2, Requested 1\. Please try again in [\d.]+s\.",
            error["message"],
        )
        assert 1 <= int(answer.headers["retry-after"]) <= 30
        assert int(answer.headers["retry-after-ms"]) <= 30_000
        assert answer.headers["x-ratelimit-remaining-requests"] == "0"


def test_tokens_and_what_can_never_pass(system: System, limited: Callable[..., Limited]) -> None:
    with system.http(limited(tokens_per_minute=100).key) as client:
        large = ask(client, max_tokens=97)
        assert large.json()["error"]["message"].startswith("Request too large for toy in organization ")
        assert (large.status_code, large.headers["x-should-retry"]) == (429, "false")
        assert "retry-after" not in large.headers
        assert ask(client, max_tokens=96).status_code == 200
        refused = ask(client, max_tokens=96)
        assert (refused.status_code, refused.json()["error"]["type"]) == (429, "tokens")
        assert (
            "on tokens per min (TPM): Limit 100, Used 100, Requested 100."
            in refused.json()["error"]["message"]
        )


def test_n_counts_and_the_default_answer_fits(
    system: System, engine: FakeEngine, limited: Callable[..., Limited]
) -> None:
    with system.http(limited(tokens_per_minute=30).key) as client:
        assert ask(client, n=5).json()["error"]["message"].count("Requested 34") == 1
        chat = {"model": "toy", "messages": [{"role": "user", "content": "a"}]}
        assert client.post("/v1/chat/completions", json=chat).status_code == 200
    assert len(engine.seen[-1].prompt) + engine.seen[-1].sampling.max_tokens == 30


def test_a_bad_request_is_one_of_the_minutes_and_takes_no_tokens(
    system: System, limited: Callable[..., Limited]
) -> None:
    with system.http(limited(requests_per_minute=3, tokens_per_minute=1000).key) as client:
        bad = [ask(client, model="unknown"), ask(client, temperature=9), ask(client, max_tokens=10**6)]
        assert [answer.status_code for answer in bad] == [404, 400, 400]
        assert {answer.headers["x-ratelimit-remaining-tokens"] for answer in bad} == {"1000"}
        assert ask(client).status_code == 429
        assert ask(client, temperature=9).status_code == 429


def test_requests_at_once(system: System, engine: FakeEngine, limited: Callable[..., Limited]) -> None:
    engine.behaviour = Behaviour(step_seconds=0.05)
    with system.http(limited(concurrent_requests=2).key) as client, ThreadPoolExecutor(2) as pool:
        running = [pool.submit(ask, client, max_tokens=20) for _ in range(2)]
        until(lambda: engine.running == 2)
        refused = ask(client)
        assert refused.status_code == 429
        assert "on concurrent requests: Limit 2, Used 2, Requested 1." in refused.json()["error"]["message"]
        assert refused.headers["retry-after"] == "1"
        assert [answer.result().status_code for answer in running] == [200, 200]
        assert [ask(client).status_code for _ in range(5)] == [200] * 5  # each is free when it ends


def left(client: httpx.Client) -> int:
    return int(ask(client, temperature=9).headers.get("x-ratelimit-remaining-tokens", -1))


def test_a_client_that_hangs_up_gets_its_tokens_back(
    system: System, engine: FakeEngine, limited: Callable[..., Limited]
) -> None:
    engine.behaviour = Behaviour(step_seconds=0.05)
    tenant = limited(tokens_per_minute=200, requests_per_minute=1000, concurrent_requests=1)
    with system.http(tenant.key) as client:
        with client.stream(
            "POST", "/v1/completions", json=BODY | {"max_tokens": 190, "stream": True}
        ) as answer:
            lines = answer.iter_lines()
            next(lines)
            assert left(client) <= 20
        until(lambda: engine.running == 0)
        until(lambda: left(client) >= 150)
        engine.behaviour = Behaviour()
        assert ask(client, max_tokens=100).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_what_fails_gives_its_tokens_back(
    system: System, engine: FakeEngine, limited: Callable[..., Limited], stream: bool
) -> None:
    tenant = limited(tokens_per_minute=200, requests_per_minute=1000, concurrent_requests=1)
    with system.http(tenant.key) as client:
        engine.behaviour = Behaviour(step_seconds=0.2)
        late = client.post(
            "/v1/completions",
            json=BODY | {"max_tokens": 190, "stream": stream},
            headers={"x-request-timeout": "0.05"},
        )
        assert "deadline" in late.text
        until(lambda: left(client) >= 180)
        engine.behaviour = Behaviour(stop_after=3)
        assert ask(client, max_tokens=150, stream=stream).status_code == 200
        assert left(client) >= 170


def test_a_lost_engine_gives_tokens_back(
    system: System, engine: FakeEngine, limited: Callable[..., Limited]
) -> None:
    tenant = limited(tokens_per_minute=200, requests_per_minute=1000, concurrent_requests=1)
    engine.behaviour = Behaviour(step_seconds=1.0)
    with system.http(tenant.key) as client, ThreadPoolExecutor(1) as pool:
        running = pool.submit(ask, client, max_tokens=190)
        until(lambda: engine.running == 1)
        system.call(engine.crash())
        assert running.result().status_code == 503
        system.call(engine.start())
        until(lambda: system.app.state.services.engine.ready)
        engine.behaviour = Behaviour()
        assert left(client) >= 190
        assert ask(client).status_code == 200


def test_the_openai_client_waits_and_succeeds(system: System, limited: Callable[..., Limited]) -> None:
    tenant = limited(requests_per_minute=50)
    with openai.OpenAI(base_url=f"{system.url}/v1", api_key=tenant.key, max_retries=2) as client:
        start, asked = time.monotonic(), 53
        for _ in range(asked):
            client.completions.create(model="toy", prompt="hi", max_tokens=1)
        assert time.monotonic() - start > 2  # three had to wait, for 1.2 s each at most
    with (
        openai.OpenAI(base_url=f"{system.url}/v1", api_key=tenant.key, max_retries=0) as client,
        pytest.raises(openai.RateLimitError) as refused,
    ):
        client.completions.create(model="toy", prompt="hi", max_tokens=1)
    assert refused.value.code == "rate_limit_exceeded"


@pytest.fixture
def client_of(system: System) -> Iterator[Callable[[Limited], tuple[openai.OpenAI, list[int]]]]:
    """The unchanged SDK with its own two retries, and the statuses of its attempts."""
    with ExitStack() as stack:

        def client(tenant: Limited) -> tuple[openai.OpenAI, list[int]]:
            attempts: list[int] = []
            hooks = {"response": [lambda response: attempts.append(response.status_code)]}
            http = stack.enter_context(openai.DefaultHttpxClient(event_hooks=hooks))
            sdk = openai.OpenAI(base_url=f"{system.url}/v1", api_key=tenant.key, http_client=http)
            return sdk, attempts

        yield client


ClientOf = Callable[[Limited], tuple[openai.OpenAI, list[int]]]


def test_the_sdk_waits_as_long_as_the_tokens_need(
    limited: Callable[..., Limited], client_of: ClientOf
) -> None:
    sdk, attempts = client_of(limited(tokens_per_minute=600))
    for _ in range(3):
        sdk.completions.create(model="toy", prompt=[1, 2, 3, 4], max_tokens=196)
    start = time.monotonic()
    sdk.completions.create(model="toy", prompt=[1, 2, 3, 4], max_tokens=6)  # ten flow in a second
    assert attempts in ([200, 200, 200, 429, 200], [200, 200, 200, 200])  # on a machine that was busy
    assert len(attempts) == 4 or time.monotonic() - start > 0.2


def test_the_sdk_does_not_repeat_what_never_fits(
    limited: Callable[..., Limited], client_of: ClientOf
) -> None:
    sdk, attempts = client_of(limited(tokens_per_minute=100))
    with pytest.raises(openai.RateLimitError, match="Request too large"):
        sdk.completions.create(model="toy", prompt=[1, 2, 3, 4], max_tokens=200)
    assert attempts == [429]


def test_the_sdk_comes_back_when_another_request_has_ended(
    system: System, engine: FakeEngine, limited: Callable[..., Limited], client_of: ClientOf
) -> None:
    tenant = limited(concurrent_requests=1)
    sdk, attempts = client_of(tenant)
    engine.behaviour = Behaviour(step_seconds=0.05)
    with system.http(tenant.key) as other, ThreadPoolExecutor(1) as pool:
        running = pool.submit(ask, other, max_tokens=10)
        until(lambda: engine.running == 1)
        sdk.completions.create(model="toy", prompt="hi", max_tokens=1)
        assert running.result().status_code == 200
    assert attempts[-1] == 200
    assert set(attempts[:-1]) <= {429}


def test_tokens_that_wait(system: System, engine: FakeEngine, limited: Callable[..., Limited]) -> None:
    engine.behaviour = Behaviour(step_seconds=4.0)  # of the clock: the first tokens come with the next one
    until(lambda: time.monotonic() % 4 < 1)
    with system.http(limited(queued_tokens=25).key) as client, ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(ask, client) for _ in range(2)]
        until(lambda: engine.running == 2)
        refused = ask(client)
        assert refused.status_code == 429
        said = refused.json()["error"]["message"]
        assert "on queued tokens: Limit 25, Used 20, Requested 10. Please try again in 1s." in said
        assert refused.headers["retry-after"] == "1"
        engine.behaviour = Behaviour(step_seconds=0.05)
        assert [answer.result().status_code for answer in waiting] == [200, 200]
        assert ask(client).status_code == 200


def test_refusals_are_counted_by_limit(system: System, limited: Callable[..., Limited]) -> None:
    def counted() -> dict[str, float]:
        with system.http() as client:
            text = client.get("/metrics").text
        found = re.findall(r'polypeft_rate_limited_total\{limit="(\w+)"\} ([\d.]+)', text)
        return {limit: float(count) for limit, count in found}

    before = counted()
    with system.http(limited(requests_per_minute=1).key) as client:
        assert [ask(client).status_code for _ in range(3)] == [200, 429, 429]
    with system.http(limited(tokens_per_minute=9).key) as client:
        assert ask(client).status_code == 429
    after = counted()
    assert {limit: after[limit] - before[limit] for limit in after} == {
        "requests": 2,
        "tokens": 0,
        "concurrent": 0,
        "queued": 0,
        "size": 1,
    }


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (0.0001, "1ms"), (0.174, "174ms"), (1, "1s"), (1.5, "1.5s"), (90, "1m30s"), (60, "1m0s")],
)
def test_durations_are_gos(seconds: float, text: str) -> None:
    assert duration(seconds) == text
    assert duration(math.nextafter(seconds, -1)) == text
