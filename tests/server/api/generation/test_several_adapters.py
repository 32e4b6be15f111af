"""`adapters`: several of a tenant's adapters in one request. What comes of it: tests/server/engine."""

from typing import Any

import httpx
import pytest

from server.engine.fake import FakeEngine
from tests.server.api.conftest import System, lora_files


@pytest.fixture(scope="module", autouse=True)
def uploaded(system: System, key: str) -> None:
    with system.http(key) as client:
        for seed, name in enumerate(("warm", "terse")):
            answer = client.post("/v1/adapters", data={"name": name}, files=lora_files(seed))
            assert answer.status_code == 201, answer.text


def ask(http: httpx.Client, adapters: Any, **fields: Any) -> httpx.Response:
    body = {"model": "toy", "prompt": "hi", "max_tokens": 2, "adapters": adapters}
    return http.post("/v1/completions", json=body | fields)


BOTH = [{"name": "warm", "weight": 0.7}, {"name": "terse@1", "weight": -0.5}]


def test_they_reach_the_engine_with_their_weights(http: httpx.Client, engine: FakeEngine) -> None:
    assert ask(http, BOTH).status_code == 200
    (row,) = engine.seen
    assert row.adapter is None
    assert [(use.adapter.name, use.adapter.version, use.weight) for use in row.adapters] == [
        ("warm", 1, 0.7),
        ("terse", 1, -0.5),
    ]


def test_chat_takes_them_too(http: httpx.Client, engine: FakeEngine) -> None:
    body = {"model": "toy", "messages": [{"role": "user", "content": "hi"}], "adapters": [{"name": "warm"}]}
    assert http.post("/v1/chat/completions", json=body | {"max_tokens": 1}).status_code == 200
    assert [use.weight for use in engine.seen[0].adapters] == [1.0]


def test_the_fingerprint_tells_every_combination_apart(http: httpx.Client) -> None:
    asked = [BOTH, BOTH[:1], BOTH[::-1], [{"name": "warm", "weight": 0.71}], []]
    prints = [ask(http, adapters).json()["system_fingerprint"] for adapters in asked]
    assert len(set(prints)) == len(asked)


@pytest.mark.parametrize(
    ("adapters", "fields", "status", "param"),
    [
        (BOTH, {"model": "warm"}, 400, "model"),
        ([{"name": "nobody"}], {}, 404, "adapters"),
        ([{"name": "warm"}] * 5, {}, 400, "adapters"),
        ([{"name": "warm", "weight": 17}], {}, 400, "adapters.0.weight"),
        ([{"name": "warm", "weight": "1"}], {}, 400, "adapters.0.weight"),
        ([{"weight": 1}], {}, 400, "adapters.0.name"),
        ([{"name": "warm", "path": "/etc"}], {}, 400, "path"),
        ("warm", {}, 400, "adapters"),
    ],
)
def test_what_cannot_be_is_refused_by_name(
    http: httpx.Client,
    engine: FakeEngine,
    adapters: Any,
    fields: dict[str, Any],
    status: int,
    param: str | None,
) -> None:
    answer = ask(http, adapters, **fields)
    assert answer.status_code == status, answer.text
    assert answer.json()["error"]["param"] == param
    assert engine.seen == []


def test_another_tenants_are_unknown(system: System, other_key: str, engine: FakeEngine) -> None:
    with system.http(other_key) as client:
        foreign, unknown = ask(client, BOTH), ask(client, [{"name": "nobody"}])
    assert foreign.status_code == unknown.status_code == 404
    assert foreign.json()["error"]["message"].replace("warm", "nobody") == unknown.json()["error"]["message"]
