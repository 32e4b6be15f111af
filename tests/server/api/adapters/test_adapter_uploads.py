"""/v1/adapter_uploads on a real S3: bytes past the server, and nothing visible before it has looked."""

import hashlib
import json
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from adapters_store import upload_records
from server.engine.fake import FakeEngine
from tests.fixtures.faults import StoreFaults
from tests.fixtures.s3 import Weed
from tests.server.api.conftest import Files, System, lora_config, lora_files, parts, started

URL = "/v1/adapter_uploads"
ZEROS = "0" * 64


@pytest.fixture(scope="module")
def system(valkey_url: str, weed: Weed) -> Iterator[System]:
    with started(valkey_url, store=weed.url(), store_config=weed.config, max_uploads_per_tenant=3) as it:
        yield it


@pytest.fixture
def http(system: System, engine: FakeEngine) -> Iterator[httpx.Client]:
    """A tenant of this test's own."""
    with system.http(system.tenant("fresh")) as client:
        yield client


def contents(files: Files) -> dict[str, bytes]:
    return {name: data for _, (name, data, _) in files}


def start(http: httpx.Client, name: str, files: dict[str, bytes], **fields: Any) -> httpx.Response:
    announced = [{"name": file, "bytes": len(data)} for file, data in files.items()]
    return http.post(URL, json={"name": name, "files": announced} | fields)


def put(upload: dict[str, Any], files: dict[str, bytes]) -> None:
    """To the store, without a key of ours."""
    for file in upload["files"]:
        assert httpx.request(file["method"], file["url"], content=files[file["name"]]).status_code == 200


def complete(http: httpx.Client, upload: dict[str, Any], files: dict[str, bytes]) -> httpx.Response:
    digests = {file["name"]: hashlib.sha256(files[file["name"]]).hexdigest() for file in upload["files"]}
    return http.post(f"{URL}/{upload['id']}/complete", json={"sha256": digests})


def sent(http: httpx.Client, name: str, files: dict[str, bytes], **fields: Any) -> dict[str, Any]:
    upload: dict[str, Any] = start(http, name, files, **fields).json()
    put(upload, files)
    return upload


def left(system: System, *uploads: dict[str, Any]) -> list[str]:
    """What lies in the store of them."""
    keys = system.app.state.services.objects.list_sync("tenants")
    return [key for key in keys if any(f"/direct/{upload['id']}/" in key for upload in uploads)]


def names(http: httpx.Client) -> list[str]:
    return [adapter["name"] for adapter in http.get("/v1/adapters").json()["data"]]


def test_an_adapter_comes_past_the_server(http: httpx.Client, engine: FakeEngine, system: System) -> None:
    files = contents(lora_files())
    began = start(http, "mine", files)
    assert began.status_code == 201, began.text
    upload = began.json()
    assert [file["name"] for file in upload["files"]] == ["adapter_config.json", "adapter_model.safetensors"]
    assert (upload["status"], upload["expires_at"] - upload["created_at"] >= 3599) == ("pending", True)
    put(upload, files)
    assert names(http) == []
    answer = complete(http, upload, files)
    assert answer.status_code == 201, answer.text
    assert answer.json()["id"] == "mine@1"
    assert answer.json()["sha256"] == hashlib.sha256(files["adapter_model.safetensors"]).hexdigest()
    assert len(engine.checked) == 1
    got = http.get("/v1/adapters/mine/versions/1/download").content
    assert got == files["adapter_model.safetensors"]
    assert left(system, upload) == []
    again = complete(http, upload, files)
    assert (again.status_code, again.json()) == (201, answer.json())
    said = http.get(f"{URL}/{upload['id']}").json()
    assert (said["status"], said["version"]) == ("completed", 1)
    assert "url" not in said["files"][0]
    assert len(http.get("/v1/adapters/mine").json()["versions"]) == 1


def test_what_a_url_brings_later_changes_nothing_and_is_swept(http: httpx.Client, system: System) -> None:
    files = contents(lora_files())
    upload = sent(http, "mine", files)
    assert complete(http, upload, files).status_code == 201
    put(upload, dict.fromkeys(files, b"other"))
    got = http.get("/v1/adapters/mine/versions/1/download").content
    assert got == files["adapter_model.safetensors"]
    assert len(left(system, upload)) == 2
    services = system.app.state.services
    due = dict(system.call(services.redis.zrange("pp:doomed", 0, -1, withscores=True)))
    (prefix,) = [key for key in due if upload["id"].encode() in key]
    assert due[prefix] / 1000 > upload["expires_at"]
    system.call(services.redis.zadd("pp:doomed", {prefix: 1}))
    system.call(services.files.scheduled_deletes.sweep())
    assert left(system, upload) == []


def test_what_is_not_what_was_announced_is_refused_and_may_come_again(
    http: httpx.Client, engine: FakeEngine, system: System
) -> None:
    files = contents(lora_files())
    upload = start(http, "mine", files).json()
    missing = complete(http, upload, files)
    assert (missing.status_code, missing.json()["error"]["param"]) == (400, "files")
    longer = {name: data + b"x" for name, data in files.items()}
    put(upload, longer)
    assert "announced" in complete(http, upload, longer).json()["error"]["message"]
    flipped = {name: bytes([data[0] ^ 1]) + data[1:] for name, data in files.items()}
    put(upload, flipped)
    wrong = complete(http, upload, files)
    assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "sha256")
    assert (names(http), engine.checked) == ([], [])
    put(upload, files)
    assert complete(http, upload, files).status_code == 201


def test_what_need_not_be_sent_is_named(http: httpx.Client) -> None:
    files = contents(lora_files()) | {"chat_template.jinja": b"{{ x }}"}
    made = start(http, "templated", files).json()
    assert {one["file"] for one in made["ignored"]} == {"README.md", "chat_template.jinja"}
    assert {file["name"] for file in made["files"]} == files.keys() - {"README.md", "chat_template.jinja"}


def test_the_gate_is_the_gate_of_every_upload(http: httpx.Client, engine: FakeEngine) -> None:
    good = contents(lora_files())["adapter_model.safetensors"]
    bad = contents(parts(good, lora_config(init_lora_weights="pissa")))
    bad.pop("README.md")
    answer = complete(http, sent(http, "bad", bad), bad)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_adapter")
    assert (names(http), engine.checked) == ([], [])
    engine.behaviour.refuse = ("invalid_adapter", "Tensor 'x' holds NaN or Inf.", "x")
    files = contents(lora_files())
    assert complete(http, sent(http, "bad", files), files).status_code == 400
    assert names(http) == []


def test_create_only_holds_here_too(http: httpx.Client) -> None:
    files = contents(lora_files())
    uploads = [sent(http, "once", files, create_only=True) for _ in range(2)]
    assert [complete(http, upload, files).status_code for upload in uploads] == [201, 409]


def test_another_tenants_upload_is_unknown(system: System, http: httpx.Client) -> None:
    files = contents(lora_files())
    upload = sent(http, "mine", files)
    with system.http(system.tenant("other")) as other:
        for method, path, body in (
            ("GET", "", None),
            ("POST", "/cancel", None),
            ("POST", "/complete", {"sha256": {"adapter_config.json": "0" * 64}}),
        ):
            answers = [
                other.request(method, f"{URL}/{id_}{path}", json=body)
                for id_ in (upload["id"], "adup_" + "0" * 24)
            ]
            assert [answer.status_code for answer in answers] == [404, 404]
            texts = {answer.text.replace(upload["id"], "adup_" + "0" * 24) for answer in answers}
            assert len(texts) == 1
    assert complete(http, upload, files).status_code == 201


def test_urls_reach_one_key_of_the_tenant_and_only_by_put(http: httpx.Client, system: System) -> None:
    files = contents(lora_files())
    upload = start(http, "mine", files).json()
    file = upload["files"][0]
    assert httpx.put(file["url"].replace("/0?", "/../../x?"), content=b"x").status_code == 403
    assert httpx.put(file["url"].replace("/0?", "/7?"), content=b"x").status_code == 403
    assert httpx.get(file["url"]).status_code == 403
    assert left(system, upload) == []


@pytest.mark.parametrize(
    ("name", "files", "status"),
    [
        ("../x", {"adapter_config.json": 5, "adapter_model.safetensors": 5}, 400),
        ("toy", {"adapter_config.json": 5, "adapter_model.safetensors": 5}, 400),
        ("a", {"adapter_config.json": 5}, 400),
        ("a", {"adapter_config.json": 5, "../adapter_model.safetensors": 5}, 415),
        ("a", {"adapter_config.json": 0, "adapter_model.safetensors": 5}, 400),
        ("a", {"adapter_config.json": 5, "adapter_model.safetensors": 2**60}, 413),
        ("a", {}, 400),
    ],
)
def test_what_cannot_become_an_adapter_gets_no_url(
    http: httpx.Client, name: str, files: dict[str, int], status: int
) -> None:
    announced = [{"name": file, "bytes": size} for file, size in files.items()]
    answer = http.post(URL, json={"name": name, "files": announced})
    assert answer.status_code == status, answer.text
    assert answer.json()["error"]["message"]


@pytest.mark.parametrize(
    "sha256",
    [
        {},
        {"adapter_config.json": ZEROS},
        {"adapter_config.json": "0", "adapter_model.safetensors": ZEROS},
    ],
)
def test_digests_that_are_none_are_400(http: httpx.Client, sha256: dict[str, str]) -> None:
    upload = start(http, "mine", contents(lora_files())).json()
    answer = http.post(f"{URL}/{upload['id']}/complete", json={"sha256": sha256})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "sha256")


def test_open_uploads_are_capped_and_cancelled_ones_do_not_count(http: httpx.Client, system: System) -> None:
    files = contents(lora_files())
    uploads = [sent(http, "mine", files) for _ in range(3)]
    refused = start(http, "mine", files)
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "quota_exceeded")
    cancel = f"{URL}/{uploads[0]['id']}/cancel"
    assert [http.post(cancel).json()["status"] for _ in range(2)] == ["cancelled"] * 2
    assert len(left(system, *uploads)) == 4
    assert complete(http, uploads[0], files).status_code == 409
    assert start(http, "mine", files).status_code == 201
    for upload in uploads[1:]:
        assert complete(http, upload, files).status_code == 201
        assert http.post(f"{URL}/{upload['id']}/cancel").status_code == 409


def test_an_abandoned_one_expires_and_is_swept(
    http: httpx.Client, system: System, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upload_records, "LIFE_SECONDS", 0)
    files = contents(lora_files())
    services = system.app.state.services
    monkeypatch.setattr("server.api.routes.adapters.uploads.LIFE_SECONDS", 0)
    monkeypatch.setattr("server.api.routes.adapters.uploads.GRACE_SECONDS", 0)
    upload = start(http, "mine", files).json()
    assert upload["status"] == "expired"
    key = system.call(services.redis.zrange("pp:doomed", 0, -1))
    assert any(upload["id"].encode() in prefix for prefix in key)
    services.objects.put_sync(key[0].decode() + "0", b"x")
    system.call(services.files.scheduled_deletes.sweep())
    assert left(system, upload) == []
    assert complete(http, start(http, "m", files).json() | {"id": upload["id"]}, files).status_code == 409


def test_two_that_complete_it_at_once_make_one_version(http: httpx.Client, engine: FakeEngine) -> None:
    files = contents(lora_files())
    upload = sent(http, "mine", files)
    statuses: list[int] = []
    threads = [
        threading.Thread(target=lambda: statuses.append(complete(http, upload, files).status_code))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(statuses) <= {201, 409}
    assert complete(http, upload, files).status_code == 201
    assert len(http.get("/v1/adapters/mine").json()["versions"]) == 1


def test_who_died_after_publishing_is_followed_by_one_who_finds_it(
    http: httpx.Client, system: System, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = contents(lora_files())
    upload = sent(http, "mine", files)
    directs = system.app.state.services.presigned_uploads
    real = directs.complete

    async def dies(*_args: object) -> None:
        raise RuntimeError("died")

    async def stays(*_args: object) -> None:
        """Of a claim nothing is heard any more."""

    monkeypatch.setattr(directs, "complete", dies)
    monkeypatch.setattr(directs, "release", stays)
    assert complete(http, upload, files).status_code == 500
    monkeypatch.setattr(directs, "complete", real)
    assert complete(http, upload, files).status_code == 409  # somebody seems to be at it
    assert http.post(f"{URL}/{upload['id']}/cancel").status_code == 409
    monkeypatch.setattr(upload_records, "CLAIM_SECONDS", -1)
    answer = complete(http, upload, files)
    assert (answer.status_code, answer.json()["version"]) == (201, 1)
    assert len(http.get("/v1/adapters/mine").json()["versions"]) == 1


def test_what_a_dead_one_held_can_be_cancelled(
    http: httpx.Client, system: System, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload = start(http, "mine", contents(lora_files())).json()
    directs = system.app.state.services.presigned_uploads
    held = system.call(directs.get(upload_tenant(system, upload), upload["id"]))
    system.call(directs.claim(held, "somebody", 1))
    cancel = f"{URL}/{upload['id']}/cancel"
    assert http.post(cancel).status_code == 409
    monkeypatch.setattr(upload_records, "CLAIM_SECONDS", -1)
    assert http.post(cancel).json()["status"] == "cancelled"


def upload_tenant(system: System, upload: dict[str, Any]) -> str:
    """Whose it is: the store's keys say so, the API does not."""
    redis = system.app.state.services.redis
    keys = system.call(redis.keys(f"pp:direct:*:{upload['id']}"))
    tenant: str = keys[0].decode().split(":")[2]
    return tenant


def test_a_store_in_a_folder_takes_none(valkey_url: str) -> None:
    with started(valkey_url) as system, system.http(system.tenant("t")) as http:
        answer = start(http, "mine", contents(lora_files()))
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "direct_uploads_off")
        assert "POST /v1/adapters" in json.loads(answer.text)["error"]["message"]


def test_every_failing_store_call_leaves_an_upload_that_can_be_completed(
    http: httpx.Client, store_faults: StoreFaults
) -> None:
    """For every k, before and after: an error or a version, and in the end one version for each upload."""
    statuses = set()
    for number, _ in enumerate(store_faults.each(), 1):
        with store_faults.paused():
            files = contents(lora_files(number))
            upload = sent(http, "mine", files)
        answer = complete(http, upload, files)
        statuses.add(answer.status_code)
        if answer.status_code == 503:
            assert answer.json()["error"]["code"] == "store_unavailable"
        with store_faults.paused():
            again = complete(http, upload, files)
            assert (again.status_code, again.json()["version"]) == (201, number)
            versions = http.get("/v1/adapters/mine").json()["versions"]
            assert len(versions) == number
            got = http.get(f"/v1/adapters/mine/versions/{number}/download")
            assert got.content == files["adapter_model.safetensors"]
    assert statuses == {201, 503}
    assert store_faults.met >= 12  # two heads, two downloads, two blobs, the manifest, and what is cleared
