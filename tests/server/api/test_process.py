"""`python -m server.api` as `serve` runs it: an inherited socket, and an end that drops nothing unsaid."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from server.engine.fake import FakeEngine
from server.settings import Settings, child_environment
from server.tenancy.keys import operator_key
from tests.fixtures.services import empty
from tests.server.api.conftest import toy_base
from tests.server.api.generation.tokenizers import byte_level_tokenizer
from tests.server.api.loops import LoopThread
from tests.waiting import PATIENCE, until

# an API process whose one route says whether its end of the connection sends what it has at once
PROMPT_SENDER = """
import os, socket, sys
from fastapi import FastAPI, Request
from server.api.__main__ import serve
from server.settings import Settings
app = FastAPI()
@app.get("/")
async def no_delay(request: Request) -> list[int]:
    found = []
    for name in os.listdir("/proc/self/fd"):
        try:
            own = socket.socket(fileno=os.dup(int(name)))
            if own.getpeername() == tuple(request.client):
                found.append(own.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
        except OSError:
            pass
    return found
serve(app, Settings(), int(sys.argv[1]))
"""
BODY = {"model": "toy", "prompt": "x", "max_tokens": 200, "stream": True}


class Api:
    """The API process over a fake engine that lives in this one."""

    def __init__(self, settings: Settings, loop: LoopThread) -> None:
        self._loop = loop
        self.engine = FakeEngine(settings.engine_socket, toy_base())
        loop.call(self.engine.start())
        key = operator_key(settings)
        with socket.create_server(("127.0.0.1", 0)) as listener:
            fd = listener.fileno()
            command = [sys.executable, "-m", "server.api", "--fd", str(fd)]
            environment = child_environment(settings)
            self.process = subprocess.Popen(command, pass_fds=[fd], env=environment, cwd=Path.cwd())
            url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        self.http = httpx.Client(base_url=url, headers={"authorization": f"Bearer {key}"}, timeout=30)
        until(lambda: self.http.get("/readyz").status_code == 200)

    def close(self) -> None:
        self.http.close()
        if self.process.poll() is None:
            os.kill(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self._loop.call(self.engine.close())


@pytest.fixture
def folder(valkey_url: str) -> Iterator[Path]:
    empty(valkey_url)
    path = Path(tempfile.mkdtemp(prefix="pp"))
    byte_level_tokenizer(path / "model")
    (path / "run").mkdir()
    yield path
    shutil.rmtree(path)


@pytest.mark.parametrize(("drain_seconds", "last"), [(20.0, "[DONE]"), (0.5, "engine_lost")])
def test_sigterm_lets_streams_finish_within_the_limit(
    folder: Path, valkey_url: str, drain_seconds: float, last: str
) -> None:
    settings = Settings(
        model=str(folder / "model"), data_dir=folder, redis_url=valkey_url, drain_seconds=drain_seconds
    )
    with LoopThread() as loop:
        api = Api(settings, loop)
        try:
            api.engine.behaviour.step_seconds = 0.01
            answers: list[httpx.Response] = []
            thread = threading.Thread(
                target=lambda: answers.append(api.http.post("/v1/completions", json=BODY))
            )
            thread.start()
            until(lambda: api.engine.running == 1)
            api.process.send_signal(signal.SIGTERM)
            time.sleep(0.2)
            assert api.http.get("/readyz").status_code == 503
            assert api.http.post("/v1/completions", json=BODY).status_code == 503
            thread.join(PATIENCE)
            final = answers[0].text.rstrip().rsplit("data: ", 1)[1]
            assert (final if final == "[DONE]" else json.loads(final)["error"]["code"]) == last
            assert api.process.wait(PATIENCE) == 0
        finally:
            api.close()


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_what_is_sent_waits_for_no_acknowledgement() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        command = [sys.executable, "-c", PROMPT_SENDER, str(listener.fileno())]
        process = subprocess.Popen(command, pass_fds=[listener.fileno()], cwd=Path.cwd())
        try:
            answer = httpx.get(f"http://127.0.0.1:{listener.getsockname()[1]}/", timeout=60)
            assert answer.json() == [1]
            process.terminate()
            ended = process.wait(PATIENCE)
            assert ended in (0, -signal.SIGTERM)  # uvicorn raises the signal again at its end
        finally:
            process.kill()
            process.wait()
