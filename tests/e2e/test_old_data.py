"""What commit 25a602b kept is read, its data directory and Valkey: see golden/data_25a602b/README.md."""

import hashlib
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.tenancy.key_terms import ALL_SCOPES
from tests.e2e.serving import Serving, files_of
from tests.waiting import until

OLD = Path(__file__).resolve().parents[1] / "golden" / "data_25a602b"
EXPECTED: dict[str, Any] = json.loads((OLD / "expected.json").read_text())
ANSWERS: list[dict[str, Any]] = EXPECTED["answers"]
JOBS = "/v1/fine_tuning/jobs"
TRAIN_SECONDS = 240.0


class Old:
    """Today's server on that directory, and what it answered before anything was changed."""

    def __init__(self, serving: Serving) -> None:
        self.serving = serving
        self.found = [self.get(answer["as"], answer["path"]) for answer in ANSWERS]

    def client(self, who: str) -> httpx.Client:
        return self.serving.http(EXPECTED["keys"][who])

    def get(self, who: str, path: str) -> httpx.Response:
        with self.client(who) as http:
            return http.get(path)

    def post(self, who: str, path: str, **request: Any) -> Any:
        with self.client(who) as http:
            answer = http.post(path, **request)
        assert answer.is_success, answer.text
        return answer.json()


@pytest.fixture(scope="module")
def old(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Old]:
    folder = tmp_path_factory.mktemp("old")
    with tarfile.open(OLD / "data.tar.xz") as archive:
        archive.extractall(folder / "data", filter="data")
    serving = Serving(str(smollm2), folder, *EXPECTED["options"])
    try:
        with serving:
            yield Old(serving)
    finally:
        serving.end()


def recorded(path: str) -> Any:
    [body] = [answer["body"] for answer in ANSWERS if answer["path"] == path and answer["as"] == "acme"]
    return body


def job_of(suffix: str) -> str:
    [id_] = [job["id"] for job in recorded(JOBS)["data"] if job["suffix"] == suffix]
    return str(id_)


@pytest.mark.parametrize("number", range(len(ANSWERS)), ids=[f"{a['as']} {a['path']}" for a in ANSWERS])
def test_it_answers_as_it_did(old: Old, number: int) -> None:
    """Tenants, keys, adapters, versions, aliases, pins, history, files, jobs, events, checkpoints."""
    assert old.found[number].status_code == 200, old.found[number].text
    assert old.found[number].json() == with_new_fields(ANSWERS[number]["body"], old.found[number].json())


def with_new_fields(recorded: Any, answered: Any) -> Any:
    """What was recorded, with what later versions say besides. A key of then may do all, for ever."""
    if isinstance(recorded, dict) and recorded.get("object") == "list":
        pairs = zip(recorded["data"], answered["data"], strict=True)
        return recorded | {"data": [with_new_fields(*pair) for pair in pairs]}
    if isinstance(recorded, dict) and recorded.get("object") == "key":
        unlimited = {"name": "", "scopes": list(ALL_SCOPES), "expires_at": None, "addresses": []}
        return recorded | unlimited | {"overlap_until": None, "last_used_at": answered["last_used_at"]}
    return recorded


@pytest.mark.parametrize("known", EXPECTED["texts"], ids=lambda known: known["model"])
def test_each_adapter_says_what_it_said(old: Old, known: dict[str, str]) -> None:
    if known["model"] == "poet@3":  # it was deleted since
        old.post("acme", "/v1/adapters/poet/restore", params={"version": 3})
    asked = {"model": known["model"], "prompt": EXPECTED["prompt"], "max_tokens": EXPECTED["max_tokens"]}
    answer = old.post(known["as"], "/v1/completions", json=asked | {"temperature": 0, "ignore_eos": True})
    said = {"text": answer["choices"][0]["text"], "system_fingerprint": answer["system_fingerprint"]}
    assert said == {name: known[name] for name in said}


def test_its_bytes_are_there(old: Old) -> None:
    stored = {f"/v1/files/{file['id']}/content": file["sha256"] for file in recorded("/v1/files")["data"]}
    for version in recorded("/v1/adapters/poet")["versions"]:
        stored[f"/v1/adapters/poet/versions/{version['version']}/download"] = version["sha256"]
    assert len(stored) == 5
    for path, digest in stored.items():
        assert hashlib.sha256(old.get("acme", path).content).hexdigest() == digest, path


def test_an_upload_goes_on(old: Old) -> None:
    upload = EXPECTED["upload"]
    path = f"/v1/uploads/{upload['id']}"
    last = old.post("acme", f"{path}/parts", files={"data": upload["rest"].encode()})["id"]
    done = old.post("acme", f"{path}/complete", json={"part_ids": [*upload["parts"], last]})
    assert done["status"] == "completed"
    assert old.get("acme", f"/v1/files/{done['file']['id']}/content").text == upload["text"]


def test_the_next_version_follows(old: Old, tmp_path: Path) -> None:
    """The deleted one's number is not given again; another tenant has no such adapter."""
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        file = old.get("acme", f"/v1/adapters/poet/versions/1/download?file={name}")
        (tmp_path / name).write_bytes(file.content)
    made = old.post("acme", "/v1/adapters", data={"name": "poet"}, files=files_of(tmp_path))
    assert made["id"] == "poet@4"
    assert old.get("acme", "/v1/adapters/poet/aliases/latest").json()["version"] == 4
    assert old.get("zeta", "/v1/adapters/poet").status_code == 404


def test_an_alias_knows_where_it_pointed_before(old: Old) -> None:
    path = "/v1/adapters/poet/aliases/live"
    assert recorded(path)["version"] == 2
    assert old.post("acme", f"{path}/rollback")["version"] == 1


@pytest.mark.timeout(400)
def test_a_paused_job_goes_on_from_its_checkpoint(old: Old) -> None:
    job = job_of("paused")
    before = recorded(f"{JOBS}/{job}")["progress"]["step"]
    old.post("acme", f"{JOBS}/{job}/resume")
    until(
        lambda: old.get("acme", f"{JOBS}/{job}").json()["finished_at"] is not None,
        lambda: old.serving.log()[-5000:],
        TRAIN_SECONDS,
    )
    ended = old.get("acme", f"{JOBS}/{job}").json()
    assert (ended["status"], ended["fine_tuned_model"]) == ("succeeded", "paused@1"), ended["error"]
    said = [event["message"] for event in old.get("acme", f"{JOBS}/{job}/events?limit=100").json()["data"]]
    known = [event["message"] for event in recorded(f"{JOBS}/{job}/events?limit=100")["data"]]
    assert said[-len(known) :] == known
    first = next(message for message in reversed(said[: -len(known)]) if message.startswith("Step"))
    assert first.startswith(f"Step {before + 1}/")
