"""/v1/files and /v1/uploads: by the openai SDK, and by hand where no honest client goes."""

import hashlib
import socket
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from openai.types import FileObject, Upload
from openai.types.uploads import UploadPart

from server.engine.fake import FakeEngine
from tests.server.api.conftest import System
from tests.server.api.fine_tuning.training import chats, create, send

DATA = chats()


@pytest.fixture
def fresh(system: System, engine: FakeEngine) -> str:
    """The key of a tenant of this test's own."""
    return system.tenant("fresh")


@pytest.fixture
def http(system: System, fresh: str) -> Iterator[httpx.Client]:
    with system.http(fresh) as client:
        yield client


@pytest.fixture
def sdk(system: System, fresh: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{system.url}/v1", api_key=fresh, max_retries=0) as client:
        yield client


def strict(kind: type[Any], value: Any) -> None:
    """The SDK itself takes anything; its types say what it expects."""
    kind.model_validate(value.to_dict(), strict=True)


def stored(system: System) -> list[str]:
    """Keys of files' bytes, all tenants together."""
    keys: list[str] = system.app.state.services.objects.list_sync("tenants")
    return [key for key in keys if "/files/" in key or "/uploads/" in key]


def test_a_file_comes_back_as_it_was(sdk: openai.OpenAI) -> None:
    file = sdk.files.create(file=("data.jsonl", DATA), purpose="fine-tune")
    strict(FileObject, file)
    assert (file.filename, file.bytes, file.purpose, file.status) == (
        "data.jsonl",
        len(DATA),
        "fine-tune",
        "processed",
    )
    assert sdk.files.retrieve(file.id) == file
    assert sdk.files.wait_for_processing(file.id) == file
    answer = sdk.files.content(file.id)
    assert answer.content == DATA
    assert answer.response.headers["etag"] == f'"{hashlib.sha256(DATA).hexdigest()}"'


def test_lists_page_order_and_filter(sdk: openai.OpenAI) -> None:
    ids = [sdk.files.create(file=(f"{i}.jsonl", DATA), purpose="fine-tune").id for i in range(5)]
    assert {file.id for file in sdk.files.list(limit=2)} == set(ids), "the SDK turns the pages"
    down = [file.id for file in sdk.files.list(limit=2)]
    assert [file.id for file in sdk.files.list(limit=3, order="asc")] == down[::-1]
    page = sdk.files.list(limit=2, after=down[1])
    assert ([file.id for file in page.data], page.has_more) == (down[2:4], True)
    assert sdk.files.list(purpose="fine-tune-results").data == []
    for query in ("limit=0", "limit=10001", "order=up", "after=file-x"):
        with pytest.raises(openai.BadRequestError) as caught:
            sdk.get(f"/files?{query}", cast_to=object)
        assert caught.value.param == query.partition("=")[0]


def test_a_deleted_file_is_gone_with_its_bytes(sdk: openai.OpenAI, system: System) -> None:
    before = stored(system)
    file = sdk.files.create(file=DATA, purpose="fine-tune")
    assert len(stored(system)) == len(before) + 1
    gone = sdk.files.delete(file.id)
    assert (gone.id, gone.deleted, gone.object) == (file.id, True, "file")
    assert stored(system) == before
    for call in (sdk.files.retrieve, sdk.files.content, sdk.files.delete):
        with pytest.raises(openai.NotFoundError):
            call(file.id)


def test_a_file_that_a_job_needs_stays(http: httpx.Client) -> None:
    file = send(http)
    job = create(http, file).json()["id"]
    answer = http.delete(f"/v1/files/{file}")
    assert answer.status_code == 409
    assert job in answer.json()["error"]["message"]
    http.post(f"/v1/fine_tuning/jobs/{job}/cancel")
    assert http.delete(f"/v1/files/{file}").status_code == 200


def test_others_files_are_unknown(http: httpx.Client, system: System, other_key: str) -> None:
    file = send(http)
    upload = http.post("/v1/uploads", json=announced(4)).json()["id"]
    with system.http(other_key) as other:
        for method, template in [
            ("GET", "/v1/files/{}"),
            ("GET", "/v1/files/{}/content"),
            ("DELETE", "/v1/files/{}"),
        ]:
            theirs, nobodys = (other.request(method, template.format(id_)) for id_ in (file, "file-none"))
            assert (theirs.status_code, nobodys.status_code) == (404, 404)
            assert theirs.text.replace(file, "") == nobodys.text.replace("file-none", "")
        for path, body in [("cancel", None), ("complete", {"part_ids": ["part-x"]})]:
            theirs, nobodys = (
                other.post(f"/v1/uploads/{id_}/{path}", json=body) for id_ in (upload, "upload_none")
            )
            assert (theirs.status_code, nobodys.status_code) == (404, 404)
            assert theirs.text.replace(upload, "") == nobodys.text.replace("upload_none", "")
        assert other.post(f"/v1/uploads/{upload}/parts", files={"data": b"x"}).status_code == 404
        assert file not in other.get("/v1/files").text
    assert http.get(f"/v1/files/{file}").status_code == 200


EXPIRES = "expires_after"


def life(seconds: str) -> dict[str, str]:
    return {"expires_after[anchor]": "created_at", "expires_after[seconds]": seconds}


def test_a_file_may_expire(sdk: openai.OpenAI) -> None:
    file = sdk.files.create(
        file=("a", DATA), purpose="fine-tune", expires_after={"anchor": "created_at", "seconds": 3600}
    )
    assert file.expires_at == file.created_at + 3600
    upload = sdk.uploads.create(**announced(4), expires_after={"anchor": "created_at", "seconds": 7200})
    part = sdk.uploads.parts.create(upload.id, data=b"1234").id
    whole = sdk.uploads.complete(upload.id, part_ids=[part]).file
    assert whole is not None
    assert whole.expires_at == whole.created_at + 7200


def test_what_a_file_has_not_is_left_out(http: httpx.Client) -> None:
    file = http.get(f"/v1/files/{send(http)}").json()
    assert not {"expires_at", "status_details"} & file.keys()


@pytest.mark.parametrize(
    ("files", "data", "status", "param"),
    [
        ({"file": ("a", DATA)}, {}, 400, "purpose"),
        ({"file": ("a", DATA)}, {"purpose": "assistants"}, 400, "purpose"),
        ({"file": ("a", DATA)}, {"purpose": "fine-tune-results"}, 400, "purpose"),
        ({"other": ("a", DATA)}, {"purpose": "fine-tune"}, 400, None),
        ({"file": ("a", DATA)}, {"purpose": "fine-tune", "expires_after[seconds]": "3600"}, 400, EXPIRES),
        ({"file": ("a", DATA)}, {"purpose": "fine-tune"} | life("x"), 400, EXPIRES),
        ({"file": ("a", DATA)}, {"purpose": "fine-tune"} | life("3599"), 400, EXPIRES),
        ({"file": ("a", DATA)}, {"purpose": "fine-tune"} | life("9" * 99), 400, EXPIRES),
        ({"file": ("a", b"")}, {"purpose": "fine-tune"}, 400, "file"),
        ({"file": ("../../etc/passwd", DATA)}, {"purpose": "fine-tune"}, 400, "filename"),
        ({"file": ("a" * 300, DATA)}, {"purpose": "fine-tune"}, 400, "filename"),
        ([("file", ("a", DATA)), ("file", ("b", DATA))], {}, 400, "file"),
    ],
)
def test_what_is_no_upload_is_refused_and_nothing_kept(
    http: httpx.Client, system: System, files: Any, data: dict[str, str], status: int, param: str | None
) -> None:
    before = stored(system)
    answer = http.post("/v1/files", files=files, data=data)
    assert (answer.status_code, answer.json()["error"]["param"]) == (status, param), answer.text
    assert stored(system) == before
    assert http.get("/v1/files").json()["data"] == []


def test_a_file_over_the_cap_is_refused(http: httpx.Client, system: System, fresh: str) -> None:
    """By what it announces, before a byte of it is read."""
    cap = system.settings.max_file_bytes
    head = [
        "POST /v1/files HTTP/1.1",
        *("host: x", f"authorization: Bearer {fresh}", f"content-length: {2 * cap}"),
        *("content-type: multipart/form-data; boundary=b", "", ""),
    ]
    with socket.create_connection(("127.0.0.1", http.base_url.port or 0)) as connection:
        connection.sendall("\r\n".join(head).encode())
        answer = b""
        while not answer.endswith(b"}}"):
            answer += connection.recv(65536)
    assert answer.startswith(b"HTTP/1.1 413")
    assert f"larger than {cap} bytes" in answer.decode()


def test_a_tenant_may_keep_so_many_files(http: httpx.Client, system: System) -> None:
    files = system.app.state.services.files
    most, files._max_files = files._max_files, 2
    try:
        for _ in range(2):
            send(http)
        answer = http.post("/v1/files", files={"file": DATA}, data={"purpose": "fine-tune"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (429, "quota_exceeded")
        assert "2 files" in answer.json()["error"]["message"]
        assert http.post("/v1/uploads", json=announced(4)).status_code == 429
    finally:
        files._max_files = most


def announced(size: int, **fields: Any) -> dict[str, Any]:
    defaults = {"bytes": size, "filename": "big.jsonl", "mime_type": "text/jsonl", "purpose": "fine-tune"}
    return defaults | fields


def test_parts_in_any_order_make_a_file(sdk: openai.OpenAI, system: System) -> None:
    upload = sdk.uploads.create(
        bytes=len(DATA), filename="big.jsonl", mime_type="text/jsonl", purpose="fine-tune"
    )
    strict(Upload, upload)
    assert (upload.status, upload.file) == ("pending", None)
    last = sdk.uploads.parts.create(upload.id, data=DATA[100:])
    first = sdk.uploads.parts.create(upload.id, data=DATA[:100])
    strict(UploadPart, first)
    assert (first.object, first.upload_id) == ("upload.part", upload.id)
    md5 = hashlib.md5(DATA).hexdigest()
    done = sdk.uploads.complete(upload.id, part_ids=[first.id, last.id], md5=md5)
    strict(Upload, done)
    assert done.status == "completed"
    assert done.file is not None
    assert sdk.files.content(done.file.id).content == DATA
    assert sdk.uploads.complete(upload.id, part_ids=[first.id, last.id], md5=md5) == done
    assert not [key for key in stored(system) if upload.id in key]
    with pytest.raises(openai.ConflictError):
        sdk.uploads.cancel(upload.id)


def test_the_sdks_own_chunking_works(sdk: openai.OpenAI) -> None:
    done = sdk.uploads.upload_file_chunked(
        file=DATA,
        filename="big.jsonl",
        bytes=len(DATA),
        mime_type="text/jsonl",
        purpose="fine-tune",
        part_size=64,
    )
    assert done.file is not None
    assert sdk.files.content(done.file.id).content == DATA


def test_parts_that_are_wrong_are_refused(sdk: openai.OpenAI, http: httpx.Client) -> None:
    id_ = http.post("/v1/uploads", json=announced(10)).json()["id"]
    part = sdk.uploads.parts.create(id_, data=b"12345").id
    more = sdk.uploads.parts.create(id_, data=b"67890").id

    def complete(**body: Any) -> tuple[int, str | None]:
        answer = http.post(f"/v1/uploads/{id_}/complete", json=body)
        return answer.status_code, answer.json()["error"]["param"]

    assert complete(part_ids=[part]) == (400, "part_ids")
    assert complete(part_ids=[part, part]) == (400, "part_ids")
    assert complete(part_ids=[part, "../x"]) == (400, "part_ids")
    assert complete(part_ids=[]) == (400, "part_ids")
    assert complete(part_ids=[part, more], md5="0" * 32) == (400, "md5")
    assert complete(part_ids=[part, more], md5="0") == (400, "md5")
    assert complete() == (400, "part_ids")
    for files in ({"data": b""}, {"file": b"x"}):
        assert http.post(f"/v1/uploads/{id_}/parts", files=files).status_code == 400
    cancelled = sdk.uploads.cancel(id_)
    assert cancelled.status == "cancelled"
    assert sdk.uploads.cancel(id_) == cancelled
    with pytest.raises(openai.ConflictError):
        sdk.uploads.parts.create(id_, data=b"x")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"bytes": 0}, "bytes"),
        ({"bytes": 2**60}, "bytes"),
        ({"bytes": "5"}, "bytes"),
        ({"filename": "/etc/passwd"}, "filename"),
        ({"filename": ""}, "filename"),
        ({"purpose": "vision"}, "purpose"),
        ({"expires_after": {"anchor": "created_at", "seconds": 60}}, "expires_after.seconds"),
        ({"expires_after": {"anchor": "now", "seconds": 3600}}, "expires_after.anchor"),
        ({"url": "http://127.0.0.1/"}, "url"),
    ],
)
def test_uploads_that_cannot_be_are_refused(
    http: httpx.Client, fields: dict[str, Any], param: str | None
) -> None:
    answer = http.post("/v1/uploads", json=announced(10, **fields))
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), answer.text
