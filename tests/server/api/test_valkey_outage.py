"""Valkey stands still: keys and adapters that were used lately are served by their limits, others are not."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from tests.fixtures.services import stopped
from tests.server.api.conftest import System, started, upload

BODY = {"model": "poet", "prompt": "hi", "max_tokens": 1}


@pytest.fixture(scope="module")
def short(valkey_url: str) -> Iterator[System]:
    with started(valkey_url, outage_seconds=600) as it:
        yield it


def ask(client: httpx.Client, **fields: str) -> int:
    return client.post("/v1/completions", json=BODY | fields, timeout=120).status_code


def test_a_known_key_is_served_by_its_limits_and_no_other(short: System, valkey_url: str) -> None:
    with short.http(short.operator) as operator:
        made, gone = (
            operator.post("/admin/tenants", json={"name": name}).json() for name in ("known", "gone")
        )
        limits = f"/admin/tenants/{made['id']}/limits"
        assert operator.put(limits, json={"requests_per_minute": 6}).status_code == 200
        keys = f"/admin/tenants/{gone['id']}/keys"
        with short.http(gone["key"]) as revoked:
            assert ask(revoked, model="toy") == 200
            [key] = operator.get(keys).json()["data"]
            assert operator.delete(f"{keys}/{key['id']}").status_code == 200
            assert ask(revoked, model="toy") == 401
    with (
        short.http(made["key"]) as known,
        short.http(short.tenant("unseen")) as unseen,
        short.http(gone["key"]) as revoked,
    ):
        assert upload(known, "poet").status_code == upload(known, "clerk").status_code == 201
        assert ask(known) == 200
        with stopped(valkey_url), ThreadPoolExecutor(4) as pool:
            refused = [
                pool.submit(ask, unseen, model="toy"),
                pool.submit(ask, revoked, model="toy"),  # what was known of it is forgotten
                pool.submit(ask, known, model="clerk"),  # nobody has asked for it
                pool.submit(lambda: known.delete("/v1/adapters/poet", timeout=120).status_code),
            ]
            served = [ask(known) for _ in range(7)]
            assert served.count(200) in {5, 6}  # of six five were left, and some flow in
            assert served[-1] == 429
            assert [answer.result() for answer in refused] == [503] * 4
        until_back(known)
        assert ask(known) in {200, 429}
        assert ask(unseen, model="toy") == 200
        assert ask(revoked, model="toy") == 401


def until_back(client: httpx.Client) -> None:
    """Until a call that needs Valkey answers."""
    for _ in range(60):
        if client.get("/v1/adapters", timeout=120).status_code == 200:
            return
    raise AssertionError("Valkey did not come back")
