"""Everything in test_adapters once more, with S3 below instead of a folder, and what concerns S3 alone."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from tests.fixtures.s3 import Weed
from tests.server.api.adapters.test_adapters import *  # noqa: F403 - the tests themselves
from tests.server.api.conftest import System, lora_files, started


@pytest.fixture(scope="module")
def system(valkey_url: str, weed: Weed) -> Iterator[System]:
    with started(valkey_url, store=weed.url("routes/inner"), store_config=weed.config) as it:
        yield it


def test_of_fifty_creates_on_s3_one_wins(http: httpx.Client) -> None:
    def create(_number: int) -> int:
        headers = {"if-none-match": "*"}
        answer = http.post("/v1/adapters", data={"name": "fifty"}, files=lora_files(), headers=headers)
        return answer.status_code

    with ThreadPoolExecutor(50) as pool:
        statuses = sorted(pool.map(create, range(50)))
    assert statuses == [201] + [409] * 49
    assert len(http.get("/v1/adapters/fifty").json()["versions"]) == 1


def test_all_that_was_written_lies_under_the_prefix(system: System, weed: Weed) -> None:
    """Runs last: whatever names the tests above have tried."""
    from adapters_store.object_store.store import Objects
    from adapters_store.registry.identity import OBJECT as IDENTITY

    inside = system.app.state.services.objects.list_sync("tenants")
    everything = Objects.open("s3://bucket/routes", weed.config).list_sync("inner")
    assert inside
    assert everything == [f"inner/{key}" for key in [IDENTITY, *inside]]


def test_readyz_says_how_the_store_is_and_stays_ready_without_it(system: System, http: httpx.Client) -> None:
    breaker = system.app.state.services.objects.breaker
    answer = http.get("/readyz")
    assert answer.json()["object_store"] == {"breaker": "closed"}
    for _ in range(5):
        breaker.leave(probe=False, succeeded=False)
    answer = http.get("/readyz")
    assert (answer.status_code, answer.json()["object_store"]) == (200, {"breaker": "open"})
    refused = http.post("/v1/adapters", data={"name": "x"}, files=lora_files())
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "store_unavailable")
    assert refused.headers["retry-after"]
    breaker.leave(probe=False, succeeded=True)
    assert http.post("/v1/adapters", data={"name": "x"}, files=lora_files()).status_code == 201
