"""Pins over HTTP, down to what the engine is told."""

from collections.abc import Iterator

import httpx
import pytest

from server.engine.fake import FakeEngine
from tests.server.api.conftest import System, lora_files, upload
from tests.waiting import until


@pytest.fixture
def http(system: System, engine: FakeEngine) -> Iterator[httpx.Client]:
    """A tenant of this test's own, which leaves no pin behind."""
    with system.http(system.tenant("pinning")) as client:
        yield client
        for adapter in client.get("/v1/adapters").json()["data"]:
            client.delete(f"/v1/adapters/{adapter['name']}/pin")
            client.delete(f"/v1/adapters/{adapter['name']}@prod/pin")
    until(lambda: engine.pins == [])


def test_a_pin_reaches_the_engine_and_goes_again(http: httpx.Client, engine: FakeEngine) -> None:
    digest = upload(http, "a").json()["digest"]
    answer = http.post("/v1/adapters/a/pin")
    assert (answer.status_code, answer.json()["pinned"], answer.json()["version"]) == (200, True, 1)
    until(lambda: digest in engine.prefetched)
    until(lambda: engine.pins == [digest])
    assert http.get("/v1/adapters/a/pin").json()["pinned"]
    assert not http.delete("/v1/adapters/a/pin").json()["pinned"]
    until(lambda: engine.pins == [])
    assert not http.get("/v1/adapters/a/pin").json()["pinned"]


def test_a_pin_follows_what_it_names(http: httpx.Client, engine: FakeEngine) -> None:
    first, second = (upload(http, "b", lora_files(seed)).json()["digest"] for seed in (3, 4))
    http.post("/v1/adapters/b/aliases", json={"alias": "prod", "version": 1})
    http.post("/v1/adapters/b@prod/pin")
    until(lambda: engine.pins == [first])
    http.post("/v1/adapters/b/aliases", json={"alias": "prod", "version": 2})
    until(lambda: engine.pins == [second])
    http.delete("/v1/adapters/b/versions/2")
    until(lambda: engine.pins == [])


def test_an_engine_that_starts_anew_is_told(system: System, http: httpx.Client, engine: FakeEngine) -> None:
    digest = upload(http, "c").json()["digest"]
    http.post("/v1/adapters/c/pin")
    until(lambda: engine.pins == [digest])
    system.call(engine.crash())
    engine.pins = []
    system.call(engine.start())
    until(lambda: engine.pins == [digest])


def test_pins_are_capped_and_the_tenants_own(
    system: System, http: httpx.Client, engine: FakeEngine, other_key: str
) -> None:
    for i in range(5):
        upload(http, f"n{i}", lora_files(i + 10))
    statuses = [http.post(f"/v1/adapters/n{i}/pin").status_code for i in (0, 1, 2, 3, 4, 0)]
    assert statuses == [200, 200, 200, 200, 429, 200]
    with system.http(other_key) as other:
        theirs, nobodys = (other.post(f"/v1/adapters/{name}/pin") for name in ("n0", "nothing"))
        assert theirs.status_code == nobodys.status_code == 404
        assert other.delete("/v1/adapters/n0/pin").status_code == 200
    assert http.get("/v1/adapters/n0/pin").json()["pinned"]
    assert http.get("/v1/limits").json()["max_pins_per_tenant"] == 4
