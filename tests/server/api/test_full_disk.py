"""A write that the disk has no room for is a 507 with a sentence, wherever it fails, and leaves nothing."""

import errno
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from redis import Redis as SyncRedis

from server.engine.fake import FakeEngine
from server.supervisor.disk_reserve import REFUSE_WRITES
from tests.server.api.conftest import System, upload

FILE = {"file": ("a.jsonl", b'{"text": "hello"}\n')}


def full(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def file_upload(http: httpx.Client) -> httpx.Response:
    return http.post("/v1/files", data={"purpose": "fine-tune"}, files=FILE)


def adapter_upload(http: httpx.Client) -> httpx.Response:
    return upload(http, "mine")


def no_folder(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(tempfile, "TemporaryDirectory", full)


def no_file(ending: str) -> Callable[[pytest.MonkeyPatch], None]:
    """Files of the upload itself end in .part; what the store writes is a draft, #NUMBER."""
    real = Path.open

    def open_(path: Path, mode: str = "r", *given: Any, **options: Any) -> Any:
        if set(mode) & set("wx") and ending in path.name:
            full()
        return real(path, mode, *given, **options)

    return lambda patch: patch.setattr(Path, "open", open_)


@pytest.mark.parametrize("ask", [adapter_upload, file_upload])
@pytest.mark.parametrize("fault", [no_folder, no_file(".part"), no_file("#")])
def test_an_upload(
    http: httpx.Client,
    monkeypatch: pytest.MonkeyPatch,
    ask: Callable[[httpx.Client], httpx.Response],
    fault: Callable[[pytest.MonkeyPatch], None],
) -> None:
    before = http.get("/v1/adapters").json()["data"], http.get("/v1/files").json()["data"]
    with monkeypatch.context() as patch:
        fault(patch)
        answer = ask(http)
    assert (answer.status_code, answer.json()["error"]["code"]) == (507, "insufficient_storage")
    assert answer.json()["error"]["message"].endswith("try again later.")
    assert (http.get("/v1/adapters").json()["data"], http.get("/v1/files").json()["data"]) == before
    assert ask(http).status_code in (200, 201)


def test_a_valkey_without_room_refuses_writes_and_inference_goes_on(
    system: System, http: httpx.Client, valkey_url: str, engine: FakeEngine
) -> None:
    assert upload(http, "poet").status_code == 201
    alias = {"alias": "live", "version": 1}
    with SyncRedis.from_url(valkey_url) as redis, system.http(system.operator) as operator:
        redis.config_set(REFUSE_WRITES, 1)
        try:
            writes = [
                operator.post("/admin/tenants", json={"name": "n"}),
                http.post("/v1/adapters/poet/aliases", json=alias),
                upload(http, "poet"),
                file_upload(http),
                http.delete("/v1/adapters/poet"),
            ]
            reads = [
                http.post("/v1/completions", json={"model": "poet", "prompt": "x"}),
                http.get("/v1/models"),
                http.get("/readyz"),
            ]
        finally:
            redis.config_set(REFUSE_WRITES, 0)
    assert [answer.json()["error"]["code"] for answer in writes] == ["insufficient_storage"] * 5
    assert [answer.status_code for answer in writes] == [507] * 5
    assert [answer.status_code for answer in reads] == [200] * 3
    assert http.post("/v1/adapters/poet/aliases", json=alias).status_code == 200
