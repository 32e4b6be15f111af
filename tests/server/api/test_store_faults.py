"""Every call to the store fails once, before it took effect or after, for every k until none is left.

What was acknowledged is there, nothing is there by half, and the request after the failure succeeds.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest

from server.engine.fake import FakeEngine
from tests.fixtures.faults import StoreFaults
from tests.fixtures.s3 import Weed
from tests.server.api.conftest import Files, System, lora_files, started, upload


@pytest.fixture(scope="module", params=["file", "s3"])
def system(request: pytest.FixtureRequest, valkey_url: str) -> Iterator[System]:
    given: dict[str, Any] = {}
    if request.param == "s3":
        weed: Weed = request.getfixturevalue("weed")
        given = {"store": weed.url(), "store_config": weed.config}
    with started(valkey_url, **given) as it:
        yield it


@pytest.fixture
def http(system: System, engine: FakeEngine) -> Iterator[httpx.Client]:
    with system.http(system.tenant("fresh")) as client:
        yield client


@dataclass
class Ledger:
    """What the server said of `mine`: versions and the digests of their weights."""

    http: httpx.Client
    versions: dict[int, str] = field(default_factory=dict)
    unsure: set[str] = field(default_factory=set)
    used: set[int] = field(default_factory=set)
    sent: int = 0

    def upload(self) -> int:
        self.sent += 1
        files = lora_files(self.sent)
        answer = upload(self.http, "mine", files)
        digest = digest_of(files)
        if answer.status_code == 201:
            version = answer.json()["version"]
            assert version not in self.used, "a number was used twice"
            assert answer.json()["sha256"] == digest
            self.versions[version] = digest
        else:
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "store_unavailable")
            assert answer.headers["retry-after"]
            self.unsure.add(digest)
        return answer.status_code

    def compare(self) -> None:
        """The server's word, and its bytes, against ours."""
        answer = self.http.get("/v1/adapters/mine")
        found = {v["version"]: v["sha256"] for v in answer.json().get("versions", [])}
        assert self.versions.items() <= found.items(), "a version was lost or changed"
        assert {found[number] for number in found.keys() - self.versions.keys()} <= self.unsure
        self.used |= found.keys()
        for number, digest in found.items():
            weights = self.http.get(f"/v1/adapters/mine/versions/{number}/download")
            assert weights.status_code == 200, "half there"
            assert hashlib.sha256(weights.content).hexdigest() == digest
            asked = {"model": f"mine@{number}", "prompt": "x"}
            assert self.http.post("/v1/completions", json=asked).status_code == 200


def digest_of(files: Files) -> str:
    return hashlib.sha256(files[-1][1][1]).hexdigest()


def test_upload(http: httpx.Client, store_faults: StoreFaults) -> None:
    ledger, statuses = Ledger(http), set()
    for _ in store_faults.each():
        statuses.add(ledger.upload())
        with store_faults.paused():
            assert ledger.upload() == 201, "the request after it"
    ledger.compare()
    assert statuses == {201, 503}
    assert store_faults.met >= 6  # config, weights, manifest: each before and after


def test_delete_of_a_version_and_of_all(
    http: httpx.Client, store_faults: StoreFaults, system: System
) -> None:
    ledger, gone = Ledger(http), set()
    for path in ("/v1/adapters/mine/versions/{}", "/v1/adapters/mine"):
        for _ in store_faults.each():
            with store_faults.paused():
                assert ledger.upload() == 201
            number = max(ledger.versions)
            answer = http.delete(path.format(number))
            assert answer.status_code in (200, 503)
            if answer.status_code == 503:
                assert http.delete(path.format(number)).status_code in (200, 404)
            gone |= {number}
            del ledger.versions[number]
            asked = {"model": f"mine@{number}", "prompt": "x"}
            assert http.post("/v1/completions", json=asked).status_code == 404, "stale"
    assert store_faults.met >= 2
    registry = system.app.state.services.registry
    system.call(registry.finish_deletes())
    system.call(registry.rebuild_index())
    for number in gone:
        assert http.get(f"/v1/adapters/mine/versions/{number}").status_code == 404, "it came back"


def test_alias_moves(http: httpx.Client, store_faults: StoreFaults) -> None:
    """They are Valkey's alone: no call to the store can be in their way."""
    ledger = Ledger(http)
    assert [ledger.upload(), ledger.upload()] == [201, 201]
    for k, _ in store_faults.each():
        version = 1 + k % 2
        answer = http.post("/v1/adapters/mine/aliases", json={"alias": "live", "version": version})
        assert answer.status_code == 200
        assert http.get("/v1/adapters/mine").json()["aliases"]["live"] == version
    ledger.compare()


def test_download(http: httpx.Client, store_faults: StoreFaults) -> None:
    assert Ledger(http).upload() == 201
    first = http.get("/v1/adapters/mine/versions/1/download")
    for _ in store_faults.each():
        answer = http.get("/v1/adapters/mine/versions/1/download")
        if answer.status_code == 200:
            assert answer.content == first.content
        else:
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "store_unavailable")
        with store_faults.paused():
            again = http.get("/v1/adapters/mine/versions/1/download")
        assert again.content == first.content
    assert store_faults.met >= 4  # manifest and weights
