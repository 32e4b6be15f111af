"""`polypeft serve` as its users run it: a process of its own, reached over HTTP and ended by signals."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import httpx
import openai
import psutil

from server.settings import inherited_environment
from tests.waiting import until

POLYPEFT = (sys.executable, "-c", "from server.cli.main import main; main()")

PROGRAM = """
import sys
from server.supervisor import system
system.COMMANDS["worker"] = (sys.executable, "-c", {worker!r})
from server.cli.main import main
main()
"""
START_SECONDS = 300.0
STOP_SECONDS = 60.0
READY = re.compile(r"is ready at (\S+)/v1$", re.MULTILINE)
CHILDREN = {
    "engine": "server.engine",
    "api": "server.api",
    "valkey": "valkey",
    "worker": "server.finetune",
}


def polypeft(worker: str) -> tuple[str, ...]:
    """`polypeft` with these lines of Python for its workers."""
    return (sys.executable, "-c", PROGRAM.format(worker=worker))


class Serving:
    """One data directory, and the `serve` that runs on it, if any does."""

    program: Sequence[str] = POLYPEFT

    def __init__(self, model: str, folder: Path, *options: str) -> None:
        self.data_dir = folder / "data"
        self._folder = folder
        self._options = [
            "--model",
            model,
            "--port",
            "0",
            "--log-format",
            "json",
            "--log-level",
            "debug",
            *options,
        ]
        self._process: subprocess.Popen[bytes] | None = None
        self.url = ""

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Returns when it is ready."""
        self._folder.mkdir(exist_ok=True)
        self._process = process = self.launch()
        until(lambda: process.poll() is not None or READY.search(self.said()), self.log, START_SECONDS)
        found = READY.search(self.said())
        assert found is not None, self.log()
        self.url = found[1]

    def launch(self, *options: str) -> subprocess.Popen[bytes]:
        """Another `serve` on this data directory, whatever becomes of it."""
        command = [*self.program, "serve", *self._options, "--data-dir", str(self.data_dir), *options]
        with (self._folder / "out").open("wb") as out, (self._folder / "log").open("ab") as log:
            return subprocess.Popen(command, env=inherited_environment(), stdout=out, stderr=log)

    def stop(self) -> None:
        """SIGTERM: it must end by itself, cleanly, leave no process behind, and the base as it was."""
        children = [psutil.Process(pid) for pid in self.pids()]
        self.process.terminate()
        status = self.process.wait(STOP_SECONDS)
        self._process = None
        assert status == 0, self.log()
        assert not any(alive(child.pid) for child in children)
        weights = re.findall(r"weights (\w{16})", self.log())
        assert len(weights) > 1, "the engine names them when it starts and when it ends"
        assert len(set(weights)) == 1

    def end(self) -> None:
        """For a fixture's end: gone, however it stands."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(STOP_SECONDS)
            self._process = None

    @property
    def process(self) -> "subprocess.Popen[bytes]":
        assert self._process is not None, "it does not run"
        return self._process

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def pids(self) -> list[int]:
        return [child.pid for child in psutil.Process(self.process.pid).children()]

    def pid(self, name: str) -> int:
        """Of the child called `name`, as soon as there is one."""
        until(lambda: self.pids_of(name), self.log)
        return self.pids_of(name)[-1]

    def pids_of(self, name: str) -> list[int]:
        """Of all children called so that run now."""
        found = []
        for child in psutil.Process(self.process.pid).children():
            try:
                if CHILDREN[name] in " ".join(child.cmdline()[:3]):
                    found.append(child.pid)
            except psutil.Error:
                continue
        return found

    def kill(self, name: str) -> None:
        os.kill(self.pid(name), signal.SIGKILL)

    def ready(self) -> bool:
        try:
            return self.get("/readyz").status_code == httpx.codes.OK
        except httpx.TransportError:
            return False

    def get(self, path: str, key: str | None = None) -> httpx.Response:
        """One request on a connection of its own."""
        with self.http(key) as client:
            return client.get(path)

    def said(self) -> str:
        path = self._folder / "out"
        return path.read_text() if path.exists() else ""

    def log(self) -> str:
        path = self._folder / "log"
        return path.read_text() if path.exists() else ""

    @property
    def operator(self) -> str:
        return (self.data_dir / "admin.key").read_text().strip()

    def http(self, key: str | None = None) -> httpx.Client:
        headers = {"authorization": f"Bearer {key}"} if key else {}
        return httpx.Client(base_url=self.url, headers=headers, timeout=60)

    def sdk(self, key: str) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=60)

    def asdk(self, key: str) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=60)

    def tenant(self, name: str) -> str:
        """A new tenant's key."""
        with self.http(self.operator) as client:
            answer = client.post("/admin/tenants", json={"name": name})
        assert answer.status_code == 201, answer.text
        key: str = answer.json()["key"]
        return key

    def gauge(self, name: str) -> float:
        """A metric as /metrics says it now, over all its labels."""
        lines = self.get("/metrics").text.splitlines()
        found = [line.rpartition(" ")[2] for line in lines if re.match(rf"{re.escape(name)}[ {{]", line)]
        assert found, f"no {name}"
        return sum(map(float, found))


def alive(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def files_of(folder: Path) -> list[tuple[str, tuple[str, bytes]]]:
    """Everything that save_pretrained wrote, as multipart parts."""
    return [("files", (path.name, path.read_bytes())) for path in sorted(folder.iterdir())]


def push(client: httpx.Client, name: str, folder: Path, **fields: str) -> dict[str, Any]:
    """Upload a folder of PEFT's, which must be taken."""
    answer = client.post("/v1/adapters", data={"name": name, **fields}, files=files_of(folder))
    assert answer.status_code == 201, answer.text
    made: dict[str, Any] = answer.json()
    return made


def body(model: str, prompt: str | Sequence[int], tokens: int = 16, **fields: Any) -> dict[str, Any]:
    """A greedy completion of exactly so many tokens."""
    given = {"model": model, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
    return given | fields


def ask(client: httpx.Client, model: str, prompt: str | Sequence[int], tokens: int = 16) -> str:
    """The text of that completion, which must succeed."""
    answer = client.post("/v1/completions", json=body(model, prompt, tokens))
    assert answer.status_code == 200, answer.text
    text: str = answer.json()["choices"][0]["text"]
    return text
