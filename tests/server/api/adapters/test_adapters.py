"""/v1/adapters and /v1/models: uploads through the whole pipeline, versions, aliases, deletion."""

import hashlib
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import openai
import pytest
from safetensors.torch import load

from server.engine.fake import FakeEngine
from tests.server.api.conftest import Files, System, lora_config, lora_files, parts, upload
from tests.waiting import until


@pytest.fixture
def http(system: System, engine: FakeEngine) -> Iterator[httpx.Client]:
    """A tenant of this test's own."""
    with system.http(system.tenant("fresh")) as client:
        yield client


def names(client: httpx.Client) -> list[str]:
    return [adapter["name"] for adapter in client.get("/v1/adapters").json()["data"]]


def ask(client: httpx.Client, model: str) -> httpx.Response:
    return client.post("/v1/completions", json={"model": model, "prompt": "x", "temperature": 0})


def weights_of(files: Files) -> bytes:
    return files[-1][1][1]


def test_an_upload_answers_what_the_client_can_check(http: httpx.Client, engine: FakeEngine) -> None:
    files = lora_files(rank=4)
    sha256 = hashlib.sha256(weights_of(files)).hexdigest()
    answer = upload(http, "mine", files, sha256=sha256)
    assert answer.status_code == 201, answer.text
    body = answer.json()
    expected = {
        "object": "adapter",
        "id": "mine@1",
        "name": "mine",
        "version": 1,
        "method": "lora",
        "rank": 4,
    }
    assert {key: body[key] for key in expected} == expected
    assert (body["sha256"], len(body["digest"])) == (sha256, 64)
    assert answer.headers["location"] == "/v1/adapters/mine"
    checked = json.loads(engine.checked[0])
    assert (checked["name"], checked["digest"]) == ("mine", body["digest"])
    version = http.get("/v1/adapters/mine/versions/1").json()
    assert version["facts"] == {"parameters": 4 * 2 * 4 * 16, "rank": 4}


def test_the_answer_names_the_files_that_are_not_used(http: httpx.Client) -> None:
    beside = {
        "tokenizer.json": "tokenizer",
        "tokenizer.model": "tokenizer",
        "chat_template.jinja": "base model's chat template",
        "training_args.bin": "training",
        "config.json": "base model's own",
    }
    files = lora_files() + [("files", (name, b"x", "text/plain")) for name in [*beside, "tokenizer.json"]]
    found = upload(http, "mine", files).json()["ignored"]
    assert [one["file"] for one in found] == ["README.md", *beside]
    for one in found[1:]:
        assert beside[one["file"]] in one["reason"]
    refused = upload(http, "mine", [*files, ("files", ("optimizer.pt", b"x", "text/plain"))])
    assert (refused.status_code, "optimizer.pt" in refused.text) == (415, True)


def test_an_adapter_answers_by_name_version_and_alias(http: httpx.Client, engine: FakeEngine) -> None:
    first, second = (upload(http, "mine", lora_files(seed)).json() for seed in (1, 2))
    assert (first["version"], second["version"]) == (1, 2)
    alias = http.post("/v1/adapters/mine/aliases", json={"alias": "prod", "version": 1})
    assert alias.json()["aliases"] == {"prod": 1, "latest": 2}
    answers = {model: ask(http, model).json() for model in ("toy", "mine", "mine@1", "mine@2", "mine@prod")}
    texts = {model: answer["choices"][0]["text"] for model, answer in answers.items()}
    assert texts["mine@prod"] == texts["mine@1"] != texts["mine@2"] == texts["mine"]
    assert texts["toy"] not in {texts["mine"], texts["mine@1"]}
    assert answers["mine@1"]["model"] == "mine@1"
    assert answers["mine@1"]["system_fingerprint"] == f"fp_{first['digest'][:16]}"
    ref = engine.seen[2].adapter
    assert ref is not None
    assert (ref.name, ref.version, ref.digest, ref.method) == ("mine", 1, first["digest"], "lora")


def test_the_same_weights_are_the_same_adapter_under_any_name(http: httpx.Client) -> None:
    assert upload(http, "a").json()["digest"] == upload(http, "b").json()["digest"]


def test_create_only_refuses_a_second_version(http: httpx.Client) -> None:
    def create() -> httpx.Response:
        return http.post(
            "/v1/adapters", data={"name": "once"}, files=lora_files(), headers={"if-none-match": "*"}
        )

    assert [create().status_code, create().status_code] == [201, 409]
    assert len(http.get("/v1/adapters/once").json()["versions"]) == 1


def test_of_parallel_creates_exactly_one_wins(http: httpx.Client) -> None:
    statuses: list[int] = []

    def create() -> None:
        answer = http.post(
            "/v1/adapters", data={"name": "race"}, files=lora_files(), headers={"if-none-match": "*"}
        )
        statuses.append(answer.status_code)

    threads = [threading.Thread(target=create) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(statuses) == [201] + [409] * 19


def test_a_version_whose_upload_died_before_the_index_knew_is_in_nobodys_way(
    http: httpx.Client, system: System
) -> None:
    first = upload(http, "orphaned").json()
    objects, registry = system.app.state.services.objects, system.app.state.services.registry
    (key,) = (k for k in objects.list_sync("tenants") if k.endswith("/orphaned/00000001.json"))
    blobs = system.call(registry.stage(key.split("/")[1], [("adapter_model.safetensors", Path(__file__))]))
    files = [msgspec.to_builtins(blob) for blob in blobs]
    manifest = json.loads(objects.get_sync(key)) | {"version": 2, "files": files}
    objects.create_sync(key.replace("1.json", "2.json"), json.dumps(manifest).encode())
    third = upload(http, "orphaned", lora_files(3)).json()
    assert third["version"] == 3
    assert ask(http, "orphaned@2").json()["system_fingerprint"] == f"fp_{first['digest'][:16]}"


def test_lists_are_paged_by_name(http: httpx.Client) -> None:
    for name in ("c", "a", "b"):
        upload(http, name)
    first = http.get("/v1/adapters", params={"limit": 2}).json()
    assert ([a["name"] for a in first["data"]], first["has_more"]) == (["a", "b"], True)
    second = http.get("/v1/adapters", params={"limit": 2, "after": first["last_id"]}).json()
    assert ([a["name"] for a in second["data"]], second["has_more"]) == (["c"], False)
    for limit in ("0", "101", "x"):
        assert http.get("/v1/adapters", params={"limit": limit}).status_code == 400


def test_models_are_the_base_and_the_tenants_own(system: System, engine: FakeEngine) -> None:
    key = system.tenant("models")
    with system.http(key) as http, openai.OpenAI(base_url=f"{system.url}/v1", api_key=key) as sdk:
        upload(http, "mine")
        base, mine = sdk.models.list().data
        assert (base.id, mine.id) == ("toy", "mine")
        assert mine.model_dump()["parent"] == "toy"
        assert sdk.models.retrieve("mine@latest").model_dump()["root"] == "mine@1"
        deleted = sdk.models.delete("mine")
        assert (deleted.id, deleted.deleted) == ("mine", True)
        with pytest.raises(openai.NotFoundError):
            sdk.models.retrieve("mine")
        with pytest.raises(openai.PermissionDeniedError):
            sdk.models.delete("toy")


def test_a_deleted_adapter_is_gone_everywhere(http: httpx.Client, engine: FakeEngine) -> None:
    digests = [upload(http, "mine", lora_files(seed)).json()["digest"] for seed in (1, 2)]
    assert http.delete("/v1/adapters/mine/versions/1").status_code == 200
    assert ask(http, "mine@1").status_code == 404
    assert ask(http, "mine").status_code == 200
    assert http.delete("/v1/adapters/mine").status_code == 200
    until(lambda: engine.forgotten == digests)
    for answer in (ask(http, "mine"), http.get("/v1/adapters/mine"), http.delete("/v1/adapters/mine")):
        assert answer.status_code == 404
    assert names(http) == []
    assert upload(http, "mine").json()["version"] == 3


def test_a_download_is_what_was_uploaded(http: httpx.Client, system: System) -> None:
    files = lora_files()
    upload(http, "mine", files)
    answer = http.get("/v1/adapters/mine/versions/1/download")
    assert answer.content == weights_of(files)
    assert 'filename="adapter_model.safetensors"' in answer.headers["content-disposition"]
    config = http.get("/v1/adapters/mine/versions/latest/download", params={"file": "adapter_config.json"})
    assert config.json() == json.loads(files[1][1][1])
    for other in ("../../admin.key", "x"):
        assert http.get("/v1/adapters/mine/versions/1/download", params={"file": other}).status_code == 404
    until(lambda: not list((system.settings.data_dir / "incoming").iterdir()))


def test_what_the_engine_refuses_is_never_visible(http: httpx.Client, engine: FakeEngine) -> None:
    engine.behaviour.refuse = ("invalid_adapter", "Tensor 'x' holds NaN or Inf.", "x")
    answer = upload(http, "mine")
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "x")
    assert names(http) == []
    assert ask(http, "mine").status_code == 404


def without(files: Files, name: str) -> Files:
    return [part for part in files if part[1][0] != name]


def named(name: str) -> Files:
    return parts(weights_of(lora_files()), lora_config(), name)


def changed(**fields: Any) -> Files:
    return parts(weights_of(lora_files()), lora_config(**fields))


GOOD = weights_of(lora_files())
REFUSED: list[tuple[str, Files, int]] = [
    ("no config", without(lora_files(), "adapter_config.json"), 400),
    ("no weights", without(lora_files(), "adapter_model.safetensors"), 400),
    ("twice", [*lora_files(), lora_files()[-1]], 400),
    ("both names", [*lora_files(), named("adapter.safetensors")[-1]], 400),
    ("a .bin that is none", named("adapter_model.bin"), 400),
    ("pickle by name", named("adapter_model.pkl"), 415),
    ("zip by name", named("adapter.zip"), 415),
    ("path", named("../adapter_model.safetensors"), 415),
    ("pickle by content", parts(b"\x80\x04\x95" + b"x" * 64, lora_config()), 415),
    ("zip by content", parts(b"PK\x03\x04" + b"x" * 64, lora_config()), 415),
    ("empty", parts(b"", lora_config()), 400),
    ("truncated", parts(GOOD[:-7], lora_config()), 400),
    ("trailing", parts(GOOD + b"x", lora_config()), 400),
    ("config no json", parts(GOOD, b"{"), 400),
    ("config twice", parts(GOOD, b'{"r": 4, "r": 8}'), 400),
    ("config not utf-8", parts(GOOD, b'{"r": "\xff"}'), 400),
    ("pissa", changed(init_lora_weights="pissa"), 400),
    ("layer_replication", changed(layer_replication=[[0, 1]]), 400),
    ("unknown field", changed(surprise=1), 400),
    ("unknown type", changed(peft_type="LOHA"), 400),
    ("wrong rank", changed(r=8), 400),
    ("rank over the limit", lora_files(rank=257), 400),
    ("no module", changed(target_modules=["nothing"]), 400),
]


@pytest.mark.parametrize(("files", "status"), [r[1:] for r in REFUSED], ids=[r[0] for r in REFUSED])
def test_a_bad_upload_is_refused_and_leaves_nothing(
    http: httpx.Client, engine: FakeEngine, system: System, files: Files, status: int
) -> None:
    answer = upload(http, "bad", files)
    assert answer.status_code == status, answer.text
    assert answer.json()["error"]["message"]
    assert names(http) == []
    assert engine.checked == []
    until(lambda: not list((system.settings.data_dir / "incoming").iterdir()))


@pytest.mark.parametrize(
    "name",
    ["../x", "/etc/x", "..%2f", "a\\b", "a\0b", "a#b", "x" * 4096, "x" * 5000, "", "a@1", "é", "a b"],
)
def test_a_name_that_could_be_a_path_is_400(http: httpx.Client, name: str) -> None:
    answer = upload(http, name)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == "name"
    assert len(answer.text) < 500
    assert names(http) == []


def test_the_bases_own_name_is_refused(http: httpx.Client) -> None:
    assert upload(http, "toy").status_code == 400


def test_another_digest_than_announced_is_400(http: httpx.Client) -> None:
    answer = upload(http, "mine", sha256="0" * 64)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "sha256")
    assert names(http) == []


def test_fields_of_somebody_else_are_refused(http: httpx.Client) -> None:
    assert upload(http, "mine", tenant_id="other").status_code == 400
    assert http.post("/v1/adapters", data={"name": ["a", "b"]}, files=lora_files()).status_code == 400
    assert http.post("/v1/adapters", files=lora_files()).status_code == 400


def test_over_the_cap_is_413_by_length_and_by_counting(http: httpx.Client) -> None:
    big = parts(b"\0" * (3 << 20), lora_config())
    assert upload(http, "big", big).status_code == 413
    request = http.build_request("POST", "/v1/adapters", data={"name": "big"}, files=big)
    raw = request.read()
    chunks = (raw[i : i + 65536] for i in range(0, len(raw), 65536))
    headers = {"content-type": request.headers["content-type"]}
    assert http.post("/v1/adapters", content=chunks, headers=headers).status_code == 413


def test_ten_thousand_parts_are_refused_and_health_answers_meanwhile(http: httpx.Client) -> None:
    part = b'--b\r\nContent-Disposition: form-data; name="files"; filename="README.md"\r\n\r\nx\r\n'
    answers: list[httpx.Response] = []

    def attack() -> None:
        headers = {"content-type": "multipart/form-data; boundary=b"}
        answers.append(http.post("/v1/adapters", content=part * 10_000 + b"--b--\r\n", headers=headers))

    thread = threading.Thread(target=attack)
    thread.start()
    assert http.get("/healthz").elapsed.total_seconds() < 0.2
    thread.join()
    assert answers[0].status_code == 400


@pytest.mark.parametrize(
    "content_type",
    ["application/json", "multipart/form-data", "multipart/form-data; boundary=" + "b" * 300, ""],
)
def test_what_is_no_multipart_is_refused(http: httpx.Client, content_type: str) -> None:
    answer = http.post("/v1/adapters", content=b"{}", headers={"content-type": content_type})
    assert answer.status_code in {400, 415}


def test_an_upload_cut_at_any_byte_leaves_nothing(http: httpx.Client, system: System) -> None:
    request = http.build_request("POST", "/v1/adapters", data={"name": "cut"}, files=lora_files())
    raw, headers = request.read(), {"content-type": request.headers["content-type"]}
    for end in [*range(0, len(raw) - 2, len(raw) // 23), len(raw) - 4]:
        answer = http.post("/v1/adapters", content=raw[:end], headers=headers)
        assert answer.status_code in {400, 415}, end
        assert names(http) == []
    assert http.post("/v1/adapters", content=raw, headers=headers).status_code == 201
    until(lambda: not list((system.settings.data_dir / "incoming").iterdir()))


def test_the_quota_of_names_is_told(http: httpx.Client) -> None:
    for i in range(20):
        assert upload(http, f"a{i}").status_code == 201
    answer = upload(http, "one-too-many")
    assert answer.status_code == 429
    assert int(answer.headers["retry-after"]) >= 1
    assert upload(http, "a0").status_code == 201


def test_the_operator_loads_from_the_configured_folder_only(system: System, engine: FakeEngine) -> None:
    folder = system.settings.lora_folder
    assert folder is not None
    (folder / "one").mkdir(parents=True)
    for _, (name, content, _) in lora_files():
        (folder / "one" / name).write_bytes(content)
    (folder / "link").symlink_to(Path("/etc"))
    with system.http(system.operator) as operator:
        body = {"lora_name": "loaded", "lora_path": str(folder / "one")}
        answer = operator.post("/v1/load_lora_adapter", json=body)
        assert answer.text == "Success: LoRA adapter 'loaded' added successfully."
        assert operator.post("/v1/load_lora_adapter", json=body).status_code == 409
        assert operator.post("/v1/load_lora_adapter", json=body | {"load_inplace": True}).status_code == 200
        assert ask(operator, "loaded@2").status_code == 200
        for path in ("/etc", "../..", "link", "one/../..", "x\0y", "nothing"):
            refused = operator.post("/v1/load_lora_adapter", json=body | {"lora_path": path})
            assert refused.status_code == 400, path
        assert operator.post("/v1/unload_lora_adapter", json={"lora_name": "loaded"}).status_code == 200
        assert operator.post("/v1/unload_lora_adapter", json={"lora_name": "loaded"}).status_code == 404


def test_lora_files_are_what_they_claim() -> None:
    assert len(load(GOOD)) == 8
