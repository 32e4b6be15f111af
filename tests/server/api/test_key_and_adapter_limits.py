"""Limits of one key and of one adapter: the tightest of all holds, set by the operator or by the tenant."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import pytest

from server.engine.fake import FakeEngine
from tests.server.api.conftest import CONTEXT, System, upload

BODY = {"model": "toy", "prompt": [1, 2, 3, 4], "max_tokens": 6}  # takes 10 tokens


@dataclass
class Owner:
    """A tenant with two keys and two adapters."""

    id: str
    operator: httpx.Client
    first: httpx.Client  # of its first key
    second: httpx.Client
    key: str  # id of the second

    def ask(self, client: httpx.Client, **fields: Any) -> int:
        return client.post("/v1/completions", json=BODY | fields).status_code

    def limit(self, **limits: int) -> None:
        assert self.operator.put(f"/admin/tenants/{self.id}/limits", json=limits).status_code == 200


@pytest.fixture
def owner(system: System, engine: FakeEngine) -> Iterator[Owner]:
    with system.http(system.operator) as operator:
        made = operator.post("/admin/tenants", json={"name": "owner"}).json()
        key = operator.post(f"/admin/tenants/{made['id']}/keys").json()
        with system.http(made["key"]) as first, system.http(key["secret"]) as second:
            for name in ("poet", "clerk"):
                assert upload(first, name).status_code == 201
            yield Owner(made["id"], operator, first, second, key["id"])


def error(answer: httpx.Response) -> str:
    message: str = answer.json()["error"]["message"]
    return message


def test_a_keys_limit_holds_for_the_key_alone(owner: Owner) -> None:
    route = f"/admin/tenants/{owner.id}/keys/{owner.key}/limits"
    owner.limit(requests_per_minute=5)
    set_ = owner.operator.put(route, json={"requests_per_minute": 2, "max_n": 1, "max_context": 100}).json()
    assert set_["object"] == "key.limits"
    assert set_["in_force"] == {
        "requests_per_minute": 2,
        "tokens_per_minute": None,
        "concurrent_requests": None,
        "max_context": 100,
        "max_n": 1,
    }
    assert error(owner.second.post("/v1/completions", json=BODY | {"n": 2})) == "n must be at most 1, not 2."
    seen = owner.second.get("/v1/limits").json()
    assert (seen["max_context_tokens"], seen["max_n"], seen["requests_per_minute"]) == (100, 1, 2)
    assert owner.ask(owner.second) == 200
    refused = owner.second.post("/v1/completions", json=BODY)
    assert refused.status_code == 429
    assert f"in organization {owner.id} for this key on requests per min (RPM): Limit 2," in error(refused)
    assert refused.headers["x-ratelimit-limit-requests"] == "2"
    assert owner.ask(owner.second, temperature=9) == 429  # known before any work
    assert [owner.ask(owner.first) for _ in range(4)] == [200, 200, 200, 429]  # two of five are the key's
    assert owner.operator.put(route, json={}).json()["set"]["max_n"] is None
    assert owner.first.get("/v1/limits").json()["max_n"] == 8


def test_an_adapters_limit_holds_for_the_adapter_alone(owner: Owner) -> None:
    route = f"/admin/tenants/{owner.id}/adapters/poet/limits"
    limits = {"tokens_per_minute": 25, "max_context": 50, "max_n": 2}
    assert owner.operator.put(route, json=limits).json()["object"] == "adapter.limits"
    assert [owner.ask(client, model="poet") for client in (owner.first, owner.second)] == [200, 200]
    refused = owner.first.post("/v1/completions", json=BODY | {"model": "poet@1"})
    assert (refused.status_code, "for adapter 'poet' on tokens per min" in error(refused)) == (429, True)
    assert refused.headers["x-ratelimit-limit-tokens"] == "25"
    both = {"adapters": [{"name": "clerk"}, {"name": "poet"}]}
    assert owner.ask(owner.first, **both) == 429
    assert owner.ask(owner.first, model="clerk", n=5) == owner.ask(owner.first) == 200
    assert "n must be at most 2" in error(
        owner.first.post("/v1/completions", json=BODY | {"model": "poet", "n": 3})
    )
    too_long = owner.first.post("/v1/completions", json=BODY | {"model": "poet", "max_tokens": 60})
    assert "max_context, your limit, is 50 tokens" in error(too_long)


def test_a_tenant_divides_its_own_limits(owner: Owner) -> None:
    owner.limit(requests_per_minute=50, max_n=4)
    for route, kind in ((f"/v1/keys/{owner.key}/limits", "key"), ("/v1/adapters/poet/limits", "adapter")):
        shown = owner.first.get(route)
        assert shown.json()["in_force"]["max_context"] == CONTEXT
        above = owner.first.put(route, json={"requests_per_minute": 51})
        assert (above.status_code, error(above)) == (400, "requests_per_minute must be at most 50, not 51.")
        below = owner.first.put(
            route, json={"requests_per_minute": 49, "tokens_per_minute": 7}, headers={"If-Match": "*"}
        )
        assert (below.status_code, below.json()["object"]) == (200, f"{kind}.limits")
        assert below.json()["in_force"]["max_n"] == 4
        stale = owner.first.put(route, json={}, headers={"If-Match": shown.headers["etag"]})
        assert (stale.status_code, error(stale)) == (412, "The limits are not as If-Match says.")
        fresh = owner.first.put(route, json={}, headers={"If-Match": below.headers["etag"]})
        assert fresh.status_code == 200
        assert fresh.headers["etag"] == shown.headers["etag"]


@pytest.mark.parametrize("value", [0, -1, 10**10, 1.5, "5", True])
def test_a_wrong_limit_is_a_sentence(owner: Owner, value: object) -> None:
    for route in (f"/v1/keys/{owner.key}/limits", "/v1/adapters/poet/limits"):
        refused = owner.first.put(route, json={"concurrent_requests": value})
        assert (refused.status_code, "concurrent_requests should be" in error(refused)) == (400, True)


def test_only_what_is_the_tenants_own(owner: Owner, system: System) -> None:
    with system.http(system.tenant("other")) as other:
        assert other.put(f"/v1/keys/{owner.key}/limits", json={"max_n": 1}).status_code == 404
        assert other.put("/v1/adapters/poet/limits", json={"max_n": 1}).status_code == 404
    for unknown in (
        f"/admin/tenants/{owner.id}/keys/key_0/limits",
        "/admin/tenants/ten_0/adapters/poet/limits",
    ):
        assert owner.operator.put(unknown, json={"max_n": 1}).status_code == 404
    assert owner.first.put(f"/admin/tenants/{owner.id}/adapters/poet/limits", json={}).status_code == 403
    assert owner.first.put("/v1/adapters/poet/limits", json={"priority": "batch"}).status_code == 400


def test_limits_end_with_their_key_and_outlive_an_adapter(owner: Owner, system: System) -> None:
    redis = system.app.state.services.redis
    owner.first.put(f"/v1/keys/{owner.key}/limits", json={"max_n": 1})
    owner.first.put("/v1/adapters/poet/limits", json={"max_n": 1})
    assert owner.operator.delete(f"/admin/tenants/{owner.id}/keys/{owner.key}").status_code == 200
    assert system.call(redis.hlen("pp:limits:keys")) == 0
    assert owner.first.delete("/v1/adapters/poet").status_code == 200
    assert owner.first.get("/v1/adapters/poet/limits").status_code == 404
    assert owner.first.post("/v1/adapters/poet/restore").status_code == 200
    assert owner.first.get("/v1/adapters/poet/limits").json()["set"]["max_n"] == 1
    owner.first.delete("/v1/adapters/poet")
    assert owner.first.put("/v1/adapters/poet/limits", json={}).status_code == 200  # what is left is removed
    assert system.call(redis.exists(f"pp:limits:adapters:{owner.id}")) == 0
