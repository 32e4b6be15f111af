"""The whole system with S3 for everything: adapters, files, checkpoints, results; and a while without it.

STREAM_MIB is how large a file streams through the API while its memory is watched.
"""

import hashlib
import logging
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from adapters_store.object_store.circuit_breaker import MAX_FAILURES
from adapters_store.object_store.store import CHUNK_BYTES, CONCURRENT_PARTS, PART_BYTES
from tests.e2e.chaos.test_finetune_kills import JOB_SECONDS, Impatient, Trainings
from tests.e2e.chaos.test_process_faults import refused
from tests.e2e.conftest import OPTIONS
from tests.e2e.serving import Serving, ask, body, files_of, push
from tests.fixtures.s3 import Weed
from tests.waiting import until

PROMPT = "What is the capital of France?"
STREAM_MIB = int(os.environ.get("STREAM_MIB", "100"))
PREFIX = "a/place/of/ours"
Lora = Callable[[int], Path]
Golden = Callable[..., str]
log = logging.getLogger(__name__)


@pytest.fixture(scope="module")
def store() -> Iterator[Weed]:
    """One that may be killed."""
    it = Weed()
    try:
        it.start()
        yield it
    finally:
        it.end()


@pytest.fixture(scope="module")
def server(store: Weed, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    given = ("--store", store.url(PREFIX), "--store-config", str(store.config))
    sizes = ("--max-file-bytes", str(1 << 30), "--adapter-slots", "2", "--adapter-ram-bytes", str(1 << 20))
    it = Impatient(str(tiny), tmp_path_factory.mktemp("s3"), *OPTIONS, *given, *sizes)
    try:
        it.start()
        yield it
        it.stop()
    finally:
        it.end()


@pytest.fixture
def http(server: Serving, request: pytest.FixtureRequest) -> Iterator[httpx.Client]:
    with server.http(server.tenant(request.node.name[:40])) as client:
        yield client


def test_adapters_live_there_however_they_came(
    server: Serving, http: httpx.Client, store: Weed, lora: Lora, golden: Golden
) -> None:
    push(http, "poet", lora(0))
    files = {path.name: path.read_bytes() for path in lora(1).iterdir()}
    announced = [{"name": name, "bytes": len(data)} for name, data in files.items()]
    upload = http.post("/v1/adapter_uploads", json={"name": "direct", "files": announced}).json()
    for file in upload["files"]:
        assert httpx.put(file["url"], content=files[file["name"]]).status_code == 200
    digests = {f["name"]: hashlib.sha256(files[f["name"]]).hexdigest() for f in upload["files"]}
    done = http.post(f"/v1/adapter_uploads/{upload['id']}/complete", json={"sha256": digests})
    assert done.status_code == 201, done.text
    for name, folder in (("poet", lora(0)), ("direct", lora(1)), ("llama", None)):
        assert ask(http, name, PROMPT) == golden(folder, PROMPT)
    assert not (server.data_dir / "store").exists(), "nothing goes to a folder instead"
    said = server.log()
    assert store.options()["secret_access_key"] not in said
    assert "X-Amz-Signature" not in said
    for child in [server.process.pid, *server.pids()]:
        assert store.options()["secret_access_key"] not in " ".join(psutil.Process(child).cmdline())


@pytest.mark.timeout(JOB_SECONDS + 120)
def test_a_training_lives_there_from_data_to_results(
    server: Serving, store: Weed, http: httpx.Client
) -> None:
    trainings = Trainings(server)
    try:
        id_ = trainings.start("trained")
        assert trainings.ended(id_, "trained").losses
        job = trainings.job(id_)
        for result in job["result_files"]:
            assert trainings.http.get(f"/v1/files/{result}/content").content
        keys = store.open(PREFIX).list_sync("tenants")
        assert any(f"/files/{trainings.file}" in key for key in keys)
        assert any("checkpoint" in key for key in keys), "where it could have gone on"
        assert any("/adapters/trained/" in key for key in keys)
    finally:
        trainings.http.close()


class Watched:
    """The most memory of its own that a process has while the block runs, above what it had before."""

    def __init__(self, pid: int) -> None:
        self._process = psutil.Process(pid)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self.growth = 0

    def __enter__(self) -> "Watched":
        self._before = self._process.memory_info().rss
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(0.005):
            self.growth = max(self.growth, self._process.memory_info().rss - self._before)


def test_a_large_file_streams_through_in_little_memory(
    server: Serving, http: httpx.Client, tmp_path: Path
) -> None:
    line = b'{"prompt": "a", "completion": "' + b"x" * (1 << 20) + b'"}\n'
    path, whole = tmp_path / "large.jsonl", hashlib.sha256()
    with path.open("wb") as file:
        for number in range(STREAM_MIB):
            piece = b"%d" % number + line
            whole.update(piece)
            file.write(piece)
    api = server.pid("api")

    def send(source: Path) -> str:
        with source.open("rb") as file:
            made = http.post("/v1/files", files={"file": file}, data={"purpose": "fine-tune"}, timeout=300)
        assert made.status_code == 200, made.text
        id_: str = made.json()["id"]
        return id_

    def fetch(id_: str) -> str:
        found = hashlib.sha256()
        with http.stream("GET", f"/v1/files/{id_}/content", timeout=300) as answer:
            for chunk in answer.iter_bytes():
                found.update(chunk)
        return found.hexdigest()

    small = tmp_path / "small.jsonl"
    small.write_bytes(line)
    fetch(send(small))  # what is loaded at the first use is not the stream's
    with Watched(api) as sending:
        id_ = send(path)
    with Watched(api) as fetching:
        assert fetch(id_) == whole.hexdigest()
    log.warning("%d MiB: +%d MiB up, +%d MiB down", STREAM_MIB, sending.growth >> 20, fetching.growth >> 20)
    assert sending.growth < 2 * (CONCURRENT_PARTS + 1) * PART_BYTES + 4 * CHUNK_BYTES
    assert fetching.growth < 2 * (CONCURRENT_PARTS + 1) * PART_BYTES + 4 * CHUNK_BYTES


def test_without_its_store_it_serves_what_it_has_and_says_what_it_cannot(
    server: Serving, http: httpx.Client, store: Weed, lora: Lora, golden: Golden
) -> None:
    push(http, "poet", lora(0))
    assert ask(http, "poet", PROMPT) == golden(lora(0), PROMPT)

    def send(name: str) -> httpx.Response:
        return http.post("/v1/adapters", data={"name": name}, files=files_of(lora(1)))

    def breaker() -> Any:
        answer = server.get("/readyz")
        assert answer.status_code == 200, "what is cached is served"
        return answer.json()["object_store"]["breaker"]

    store.kill()
    try:
        for _ in range(MAX_FAILURES + 1):
            refused = send("new")
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "store_unavailable")
            assert refused.headers["retry-after"]
        assert breaker() in ("open", "half-open")
        assert ask(http, "poet", PROMPT) == golden(lora(0), PROMPT)
        assert http.get("/v1/adapters/new").status_code == 404
    finally:
        store.start()
    until(lambda: send("new").status_code == 201, server.log)
    assert breaker() == "closed"
    assert ask(http, "new", PROMPT) == golden(lora(1), PROMPT)
    answer = http.post("/v1/completions", json=body("new@1", PROMPT))
    assert answer.status_code == 200


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--store", "memory://"), "memory:// is one process's own"),
        (("--store", "s3://AK:HIDDEN@bucket/prefix"), "store must not hold credentials"),
        (("--store", "s3://bucket", "--store-config", "/nowhere/at/all"), "store_config"),
    ],
)
def test_a_store_that_cannot_be_is_refused_at_once(
    tiny: Path, tmp_path: Path, options: tuple[str, ...], sentence: str
) -> None:
    said = refused((it := Serving(str(tiny), tmp_path, *options)).launch(), it.log)
    assert sentence in said
    assert "HIDDEN" not in said
