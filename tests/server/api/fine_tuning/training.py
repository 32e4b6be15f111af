"""What tests of fine-tuning need: data files, and a worker that learns nothing but reports as one does."""

import hashlib
import json
import uuid
from collections.abc import Sequence
from typing import Any

import httpx

from server.finetune.jobs.job import (
    Checkpoint,
    Job,
    Progress,
    StoredFile,
    TrainingResult,
    new_event,
    result_prefix,
)
from tests.server.api.conftest import Files, System, lora_files


def chats(count: int = 8) -> bytes:
    """Examples of OpenAI's shape."""
    turns = [("user", "{} plus {}?"), ("assistant", "It is {}.")]
    lines = [
        {"messages": [{"role": role, "content": text.format(i, i)} for role, text in turns]}
        for i in range(count)
    ]
    return jsonl(lines)


def jsonl(lines: Sequence[object]) -> bytes:
    return b"".join(json.dumps(line).encode() + b"\n" for line in lines)


def send(client: httpx.Client, data: bytes | None = None, name: str = "data.jsonl") -> str:
    """A training file's id."""
    answer = client.post(
        "/v1/files", files={"file": (name, chats() if data is None else data)}, data={"purpose": "fine-tune"}
    )
    assert answer.status_code == 200, answer.text
    id_: str = answer.json()["id"]
    return id_


def create(client: httpx.Client, file: str | None = None, **body: Any) -> httpx.Response:
    headers = body.pop("headers", None)
    given = {"model": "toy", "training_file": file or send(client)} | body
    return client.post("/v1/fine_tuning/jobs", json=given, headers=headers)


class Worker:
    """Takes one job in the system's own loop."""

    def __init__(self, system: System, job: str) -> None:
        self._system = system
        self._jobs = system.app.state.services.jobs
        self.job: Job = system.call(self._jobs.take(job, uuid.uuid4().hex))

    def beat(self, **progress: Any) -> str:
        given = Progress(**progress) if progress else None
        wish: str = self._system.call(self._jobs.heartbeat(self.job.id, self.job.fence, given))
        return wish

    def event(self, message: str, **data: Any) -> None:
        self._call(self._jobs.add_event, new_event("info", message, "metrics", data))

    def checkpoint(self, step: int, **metrics: float) -> None:
        self._call(self._jobs.checkpoint, Checkpoint(created=1, step=step, metrics={"step": step} | metrics))

    def paused(self) -> None:
        assert self._system.call(self._jobs.release(self.job.id, self.job.fence)) == "paused"

    def finish(self, files: Files | None = None, **fields: Any) -> None:
        """As after a training whose outcome is `files`."""
        given = {name: data for _, (name, data, _) in files or lora_files()}
        given.pop("README.md")
        adapter = [self._put(name, data) for name, data in given.items()]
        reports = [self._put("metrics.csv", b"step,train_loss\n1,2.5\n"), self._put("loss.png", b"\x89PNG")]
        defaults: dict[str, Any] = {"evaluation": None, "better": True, "trained_tokens": 70, "steps": 4}
        found = TrainingResult(adapter=adapter, reports=reports, **(defaults | fields))
        self._call(self._jobs.trained, found)

    def _put(self, name: str, data: bytes) -> StoredFile:
        key, sha256 = f"{result_prefix(self.job, self.job.fence)}/{name}", hashlib.sha256(data).hexdigest()
        self._system.call(self._system.app.state.services.objects.put(key, data, sha256))
        return StoredFile(name, key, sha256, len(data))

    def _call(self, report: Any, *args: Any, **options: Any) -> None:
        assert self._system.call(report(self.job.id, self.job.fence, *args, **options)) is True
