"""When something breaks or somebody leaves: every request ends, in tokens or in an error that says so."""

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import httpx
import openai
import pytest

from server.engine.fake import FakeEngine
from tests.server.api.conftest import System
from tests.waiting import PATIENCE, until

URL = "/v1/completions"
SLOW = {"model": "toy", "prompt": "abc", "max_tokens": 200}


def events_of(answer: httpx.Response) -> list[dict[str, Any]]:
    """The stream's events; fails if it ends cleanly."""
    lines = [line for line in answer.text.split("\n\n") if line]
    assert all(line.startswith("data: ") for line in lines)
    assert "data: [DONE]" not in lines, "a clean end"
    return [json.loads(line[6:]) for line in lines]


def test_a_client_that_leaves_cancels_its_row(system: System, key: str, engine: FakeEngine) -> None:
    engine.behaviour.step_seconds = 0.02
    with system.http(key) as client, client.stream("POST", URL, json=SLOW | {"stream": True}) as stream:
        lines = stream.iter_lines()
        next(lines)
        assert engine.running == 1
    until(lambda: engine.running == 0)
    assert len(engine.cancelled) == 1
    assert system.app.state.services.engine.rows == 0


def test_a_client_that_leaves_an_unstreamed_answer_cancels_too(
    system: System, key: str, engine: FakeEngine
) -> None:
    engine.behaviour.step_seconds = 0.02
    with system.http(key) as client, pytest.raises(httpx.ReadTimeout):
        client.post(URL, json=SLOW | {"n": 3}, timeout=0.3)
    until(lambda: engine.running == 0)
    assert len(engine.cancelled) == 3


def test_an_engine_that_dies_mid_stream_ends_it_in_an_error_event(
    system: System, http: httpx.Client, engine: FakeEngine
) -> None:
    engine.behaviour.step_seconds = 0.02
    answers: list[httpx.Response] = []
    streamed, whole = SLOW | {"stream": True}, SLOW
    threads = [
        threading.Thread(target=lambda b=body: answers.append(http.post(URL, json=b)))
        for body in (streamed, whole)
    ]
    for thread in threads:
        thread.start()
    until(lambda: engine.running == 2)
    time.sleep(0.1)
    system.call(engine.crash())
    for thread in threads:
        thread.join(PATIENCE)
    ready = http.get("/readyz")
    assert (ready.status_code, ready.json()["checks"]["engine"]) == (503, False)
    refused = http.post(URL, json=SLOW)
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "unavailable")
    assert int(refused.headers["retry-after"]) >= 1

    system.call(engine.start())
    until(lambda: http.get("/readyz").status_code == 200)
    by_status = {answer.status_code: answer for answer in answers}
    assert events_of(by_status[200])[-1]["error"]["code"] == "engine_lost"
    assert by_status[503].json()["error"]["code"] == "engine_lost"
    engine.behaviour.step_seconds = 0
    assert http.post(URL, json=SLOW).status_code == 200


def test_the_sdk_raises_on_an_error_event(sdk: openai.OpenAI, engine: FakeEngine) -> None:
    engine.behaviour.step_seconds = 0.05
    with pytest.raises(openai.APIError, match="deadline"):
        for _ in sdk.completions.create(
            model="toy", prompt="a", max_tokens=200, stream=True, extra_headers={"x-request-timeout": "0.4"}
        ):
            pass


def test_the_deadline_ends_a_request_long_before_its_answer_would(
    http: httpx.Client, engine: FakeEngine
) -> None:
    engine.behaviour.step_seconds = 0.1  # 20 s for all its tokens
    for body in (SLOW, SLOW | {"stream": True}):
        started = time.monotonic()
        answer = http.post(URL, json=body, headers={"x-request-timeout": "0.4"})
        assert time.monotonic() - started < 10
        error = answer.json()["error"] if answer.status_code == 504 else events_of(answer)[-1]["error"]
        assert error["code"] == "deadline_exceeded"


def test_a_tenants_flood_is_its_own_429_and_what_was_accepted_completes(
    system: System, http: httpx.Client, engine: FakeEngine
) -> None:
    """It may have as many rows as it leaves free, 8 of 16; another tenant's request finds room."""
    engine.behaviour.step_seconds = 0.05
    with ThreadPoolExecutor(32) as pool:
        flood = [pool.submit(http.post, URL, json=SLOW) for _ in range(30)]
        until(lambda: sum(answer.done() for answer in flood) == 22)
        assert engine.running == 8
        with system.http(system.tenant("modest")) as modest:
            first = pool.submit(modest.post, URL, json=SLOW)
            until(lambda: engine.running == 9)
            refused = http.post(URL, json=SLOW | {"n": 2, "stream": True})
            engine.behaviour.step_seconds = 0
            assert first.result().status_code == 200
        statuses = sorted(answer.result().status_code for answer in flood)
    assert statuses == [200] * 8 + [429] * 22
    error = refused.json()["error"]
    assert (refused.status_code, error["type"], error["code"]) == (
        429,
        "rate_limit_error",
        "tenant_queue_full",
    )
    assert int(refused.headers["retry-after"]) >= 1


def test_a_server_that_is_full_is_503_for_whoever_comes_first(system: System, engine: FakeEngine) -> None:
    engine.behaviour.step_seconds = 0.05
    with ExitStack() as stack, ThreadPoolExecutor(2) as pool:
        one, two, three = (
            stack.enter_context(system.http(system.tenant(name))) for name in ("full-1", "full-2", "full-3")
        )
        answers = [pool.submit(client.post, URL, json=SLOW | {"n": 8}) for client in (one, two)]
        until(lambda: engine.running == 16)
        refused = three.post(URL, json=SLOW | {"stream": True})
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "queue_full")
        assert int(refused.headers["retry-after"]) >= 1
        engine.behaviour.step_seconds = 0
        assert [answer.result().status_code for answer in answers] == [200, 200]
        assert three.post(URL, json=SLOW).status_code == 200


def test_a_request_is_admitted_whole_or_not_at_all(http: httpx.Client, engine: FakeEngine) -> None:
    """One that can never be is told so; one that cannot be now runs none of its choices."""
    never = http.post(URL, json=SLOW | {"prompt": ["a", "b", "c"], "n": 6})
    assert (never.status_code, never.json()["error"]["param"]) == (400, "n")
    assert "18 choices" in never.json()["error"]["message"]
    engine.behaviour.step_seconds = 0.05
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(http.post, URL, json=SLOW | {"n": 3})
        until(lambda: engine.running == 3)
        seen = len(engine.seen)
        refused = http.post(URL, json=SLOW | {"n": 8, "stream": True})
        assert refused.status_code == 429
        assert len(engine.seen) == seen
        engine.behaviour.step_seconds = 0
        assert first.result().status_code == 200


def test_draining_refuses_new_work_and_finishes_old(
    system: System, http: httpx.Client, engine: FakeEngine
) -> None:
    engine.behaviour.step_seconds = 0.02
    answers: list[httpx.Response] = []
    thread = threading.Thread(target=lambda: answers.append(http.post(URL, json=SLOW | {"max_tokens": 20})))
    thread.start()
    until(lambda: engine.running == 1)
    system.app.state.services.draining = True
    try:
        assert http.get("/readyz").status_code == 503
        assert http.get("/healthz").status_code == 200
        assert http.post(URL, json=SLOW).status_code == 503
        assert http.post("/v1/adapters", files={"files": ("README.md", b"")}).status_code == 503
        thread.join(PATIENCE)
    finally:
        system.app.state.services.draining = False
    assert answers[0].json()["usage"]["completion_tokens"] == 20
