"""The bytes a tenant may keep in adapters: 429 beyond them, and nothing is left of what was refused."""

from collections.abc import Iterator

import httpx
import pytest

from server.engine.fake import FakeEngine
from tests.server.api.conftest import System, lora_files, started, upload

SIZE = sum(len(part[1]) for _, part in lora_files()[1:])  # of an adapter's config and weights


@pytest.fixture(scope="module")
def system(valkey_url: str) -> Iterator[System]:
    with started(valkey_url, max_adapter_bytes_per_tenant=2 * SIZE + SIZE // 2) as it:
        yield it


def blobs(system: System) -> list[str]:
    return [key for key in system.call(system.app.state.services.objects.list("tenants")) if "/blobs/" in key]


def test_one_too_many_is_refused_until_one_is_purged(
    system: System, http: httpx.Client, other_key: str
) -> None:
    assert http.get("/v1/limits").json()["max_adapter_bytes_per_tenant"] == 2 * SIZE + SIZE // 2
    assert [upload(http, name, lora_files(1)).status_code for name in ("a", "a")] == [201, 201]
    stored = blobs(system)
    for name in ("a", "b"):
        refusal = upload(http, name, lora_files(2))
        assert (refusal.status_code, refusal.json()["error"]["code"]) == (429, "quota_exceeded")
        assert str(2 * SIZE + SIZE // 2) in refusal.json()["error"]["message"]
    with system.http(other_key) as other:
        assert upload(other, "a", lora_files(1)).status_code == 201
    assert http.delete("/v1/adapters/a/versions/1").status_code == 200
    assert upload(http, "b", lora_files(2)).status_code == 429, "it can be restored"
    assert set(stored) <= set(blobs(system))
    assert http.delete("/v1/adapters/a/versions/1", params={"purge": "true"}).status_code == 200
    assert upload(http, "b", lora_files(2)).status_code == 201


def test_what_the_engine_refuses_takes_no_room(system: System, engine: FakeEngine) -> None:
    """Otherwise bad adapters would fill the store, each for a day."""
    engine.behaviour.refuse = ("invalid_adapter", "It produced a value that is not finite.", None)
    before = blobs(system)
    with system.http(system.tenant("carol")) as http:
        assert upload(http, "bad", lora_files(3)).status_code == 400
    assert blobs(system) == before
