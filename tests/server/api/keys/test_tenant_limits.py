"""/admin/tenants/{id}/limits: what the operator sets holds at once, and what is wrong is a sentence."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from tests.server.api.conftest import CONTEXT, System, started

REQUESTS = ("requests_per_minute", "tokens_per_minute", "concurrent_requests", "max_context", "max_n")
FIELDS = (
    *REQUESTS,
    "queued_tokens",
    "adapters",
    "adapter_bytes",
    "file_bytes",
    "jobs",
    "training_tokens_per_day",
    "priority",
)
UNSET = dict.fromkeys(FIELDS)


@pytest.fixture
def operator(system: System) -> Iterator[httpx.Client]:
    with system.http(system.operator) as client:
        yield client


@pytest.fixture
def route(operator: httpx.Client) -> str:
    tenant = operator.post("/admin/tenants", json={"name": "limited"}).json()["id"]
    return f"/admin/tenants/{tenant}/limits"


def test_a_new_tenant_has_the_defaults(operator: httpx.Client, route: str) -> None:
    shown = operator.get(route).json()
    assert shown["object"] == "tenant.limits"
    assert shown["set"] == UNSET
    assert shown["in_force"] == UNSET | {
        "max_context": CONTEXT,
        "max_n": 8,
        "adapters": 20,
        "adapter_bytes": 64 << 30,
        "file_bytes": 4 << 30,
        "jobs": 8,
        "priority": "interactive",
    }


def test_put_replaces_all(operator: httpx.Client, route: str) -> None:
    first = {"requests_per_minute": 7, "max_context": 100, "max_n": 2}
    assert operator.put(route, json=first).json()["set"] == UNSET | first
    second = operator.put(route, json={"tokens_per_minute": 5, "max_n": None}).json()
    assert operator.get(route).json() == second
    assert second["set"] == UNSET | {"tokens_per_minute": 5}
    assert second["in_force"]["max_n"] == 8
    assert operator.put(route, json={}).json()["set"] == UNSET


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"requests_per_minute": -1}, "requests_per_minute should be greater than or equal to 1, not -1."),
        ({"tokens_per_minute": 0}, "tokens_per_minute should be greater than or equal to 1, not 0."),
        ({"concurrent_requests": 10**10}, "less than or equal to 1000000000, not 10000000000."),
        ({"max_context": CONTEXT + 1}, f"max_context must be at most {CONTEXT}, not {CONTEXT + 1}."),
        ({"max_n": 9}, "max_n must be at most 8, not 9."),
        ({"max_n": 1.5}, "max_n should be a valid integer, not 1.5."),
        ({"requests_per_minute": "5"}, "requests_per_minute should be a valid integer, not '5'."),
        ({"requests_per_minute": True}, "requests_per_minute should be a valid integer, not True."),
        ({"requests_per_second": 5}, "'requests_per_second' is not a field of this request."),
        ({"priority": 1}, "priority should be 'interactive', 'standard' or 'batch', not 1."),
        ({"priority": "urgent"}, "priority should be 'interactive', 'standard' or 'batch', not 'urgent'."),
        ({"adapters": -1}, "adapters should be greater than or equal to 0, not -1."),
        ({"file_bytes": 2**60}, "less than or equal to 1125899906842624, not 1152921504606846976."),
        ({"jobs": 1.0}, "jobs should be a valid integer, not 1.0."),
        ({"queued_tokens": 0}, "queued_tokens should be greater than or equal to 1, not 0."),
    ],
)
def test_a_wrong_limit_is_a_sentence(
    operator: httpx.Client, route: str, body: dict[str, Any], said: str
) -> None:
    operator.put(route, json={"requests_per_minute": 3})
    refused = operator.put(route, json=body)
    assert (refused.status_code, said in refused.json()["error"]["message"]) == (400, True), refused.text
    assert operator.get(route).json()["set"] == UNSET | {"requests_per_minute": 3}


def test_only_the_operator_and_only_tenants(system: System, operator: httpx.Client, route: str) -> None:
    with system.http(system.tenant("nosy")) as tenant:
        assert tenant.get(route).status_code == 403
        assert tenant.put(route, json={"requests_per_minute": 9}).status_code == 403
    for unknown in ("ten_none", "operator"):
        for answer in (
            operator.get(f"/admin/tenants/{unknown}/limits"),
            operator.put(f"/admin/tenants/{unknown}/limits", json={"requests_per_minute": 9}),
        ):
            assert answer.status_code == 404
            assert answer.json()["error"]["message"] == f"There is no tenant '{unknown}'."


def test_of_two_operators_one_is_the_last(system: System, operator: httpx.Client, route: str) -> None:
    written = [dict.fromkeys(FIELDS[:3], value) for value in range(1, 9)]

    def put(body: dict[str, int]) -> int:
        with system.http(system.operator) as client:
            return client.put(route, json=body).status_code

    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(put, written)) == {200}
    last = operator.get(route).json()["set"]
    assert last in [UNSET | body for body in written]


def test_tenants_see_their_own_limits(system: System, operator: httpx.Client) -> None:
    made = operator.post("/admin/tenants", json={"name": "curious"}).json()
    body = {"requests_per_minute": 9, "max_context": 64, "max_n": 2}
    operator.put(f"/admin/tenants/{made['id']}/limits", json=body)
    with system.http(made["key"]) as tenant:
        seen = tenant.get("/v1/limits").json()
        assert (seen["requests_per_minute"], seen["tokens_per_minute"]) == (9, None)
        assert (seen["max_context_tokens"], seen["max_n"]) == (64, 2)
        for extra in ({"n": 3}, {"max_tokens": 64}):
            answer = tenant.post("/v1/completions", json={"model": "toy", "prompt": "hi"} | extra)
            assert answer.status_code == 400
            limit = (
                "n must be at most 2, not 3." if "n" in extra else "max_context, your limit, is 64 tokens;"
            )
            assert limit in answer.json()["error"]["message"]
        assert (
            tenant.post("/v1/completions", json={"model": "toy", "prompt": "hi", "n": 2}).status_code == 200
        )


def test_defaults_hold_for_all_but_those_with_their_own(valkey_url: str) -> None:
    with started(valkey_url, requests_per_minute=2) as own, own.http(own.operator) as operator:
        made = [operator.post("/admin/tenants", json={"name": name}).json() for name in "ab"]
        route = f"/admin/tenants/{made[0]['id']}/limits"
        assert (
            operator.put(route, json={"requests_per_minute": 4}).json()["in_force"]["requests_per_minute"]
            == 4
        )
        for tenant, allowed in zip(made, (4, 2), strict=True):
            with own.http(tenant["key"]) as client:
                body = {"model": "toy", "prompt": "hi", "max_tokens": 1}
                codes = [client.post("/v1/completions", json=body).status_code for _ in range(allowed + 1)]
            assert codes == [200] * allowed + [429]


def test_of_two_changes_none_is_lost(operator: httpx.Client, route: str) -> None:
    """What the commands do: change what was read, on condition that it is still so."""
    first, second = operator.get(route), operator.get(route)
    assert first.headers["etag"] == second.headers["etag"]
    mine = operator.put(route, json={"max_n": 1}, headers={"If-Match": first.headers["etag"]})
    assert mine.status_code == 200
    late = operator.put(route, json={"jobs": 3}, headers={"If-Match": second.headers["etag"]})
    assert (late.status_code, late.json()["error"]["code"]) == (412, "precondition_failed")
    merged = mine.json()["set"] | {"jobs": 3}
    assert (
        operator.put(route, json=merged, headers={"If-Match": mine.headers["etag"]}).json()["set"] == merged
    )
    assert operator.put(route, json={}, headers={"If-None-Match": "*"}).status_code == 400
