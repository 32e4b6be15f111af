"""A request's priority class on its way to the engine, and the refusal of one that would come too late."""

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from server.api.generation.bodies import CompletionBody
from server.api.generation.priority import priority_of
from server.engine.fake import Behaviour, FakeEngine
from tests.server.api.conftest import System

BODY: dict[str, Any] = {"model": "toy", "prompt": [1, 2, 3, 4], "max_tokens": 2}


@pytest.fixture(autouse=True)
def patient(engine: FakeEngine) -> Iterator[None]:
    yield
    engine.behaviour = Behaviour()


@pytest.mark.parametrize(
    ("fields", "priority"),
    [
        ({}, "standard"),
        ({"priority": "interactive"}, "interactive"),
        ({"priority": "batch", "service_tier": "priority"}, "batch"),
        ({"priority": 0}, "standard"),
        ({"priority": -3}, "interactive"),
        ({"priority": 7}, "batch"),
        ({"service_tier": "priority"}, "interactive"),
        ({"service_tier": "flex"}, "batch"),
        ({"service_tier": "auto"}, "standard"),
    ],
)
def test_a_class_by_each_of_its_names(
    http: httpx.Client, engine: FakeEngine, fields: dict[str, Any], priority: str
) -> None:
    assert http.post("/v1/completions", json=BODY | fields).status_code == 200
    assert engine.seen[-1].priority == priority


@pytest.mark.parametrize("priority", ["urgent", 1.5, True, [], 2**31])
def test_what_is_no_class_is_refused(http: httpx.Client, priority: Any) -> None:
    answer = http.post("/v1/completions", json=BODY | {"priority": priority})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"].startswith("priority")


def test_a_tenants_ceiling_lowers_it() -> None:
    body = CompletionBody.model_construct(model="toy", priority="interactive", service_tier=None)
    assert priority_of(body, None) == "interactive"
    assert priority_of(body, "standard") == "standard"
    assert priority_of(body, "batch") == "batch"


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_that_would_come_too_late_is_refused_at_once(
    system: System, http: httpx.Client, engine: FakeEngine, stream: bool
) -> None:
    engine.behaviour = Behaviour(wait_seconds=30)
    headers = {"x-request-timeout": "10"}
    answer = http.post("/v1/completions", json=BODY | {"stream": stream}, headers=headers)
    assert answer.status_code == 503
    error = answer.json()["error"]
    assert error["code"] == "deadline_unreachable"
    assert "would wait about 30.0 s" in error["message"]
    assert int(answer.headers["retry-after"]) in {20, 21}
    answer = http.post("/v1/completions", json=BODY, headers={"x-request-timeout": "40"})
    assert answer.status_code == 200
