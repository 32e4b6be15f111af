"""`serve` over a real Valkey and small stand-ins for engine and API."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from redis import Redis
from redis.asyncio import Redis as AsyncRedis
from redis.exceptions import BusyLoadingError

from server.errors import StartupError
from server.settings import MULTIPROCESS, Settings
from server.supervisor.embedded_valkey import wait_until_answering
from server.supervisor.resources import embedded_url
from tests.waiting import PATIENCE, until

PARENT = """
import sys, json, pathlib
from server.errors import StartupError
from server.logs import configure_logs
from server.settings import Settings
from server.supervisor import serve
folder = pathlib.Path(sys.argv[1])
commands = {name: [sys.executable, str(folder / (name + ".py"))] for name in ("engine", "api", "worker")}
configure_logs(Settings(), "serve")
try:
    serve(Settings(), lambda url: (folder / "url").write_text(url), commands)
except StartupError as error:
    sys.exit(error.message)
"""

CHILD = """
import os, pathlib, signal, sys, time
from server.child_process import run_child
folder = pathlib.Path(__file__).parent
def work(settings):
    with (folder / "{name}.pids").open("a") as file:
        file.write(f"{{os.getpid()}}\\n")
    {body}
run_child("{name}", work)
"""

ENGINE = "signal.signal(signal.SIGTERM, lambda *_: sys.exit()); time.sleep(600)"

API = """
    import http.server, socket, threading
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            if self.path == "/slow":
                (folder / "asked").touch()
                time.sleep(1)
            self.send_response(200); self.send_header("content-length", "2"); self.end_headers()
            self.wfile.write(b"ok")
        def log_message(self, *_): pass
    fd = int(sys.argv[sys.argv.index("--fd") + 1])
    server = http.server.ThreadingHTTPServer(("", 0), Handler, bind_and_activate=False)
    server.socket.close()
    server.socket = socket.socket(fileno=fd)
    server.socket.setblocking(False)  # of several that are told of a connection, one gets it
    server.daemon_threads = False
    server.handle_error = lambda *_: None  # one who asked is gone: no matter of this server's
    signal.signal(signal.SIGTERM, lambda *_: threading.Thread(target=server.shutdown).start())
    server.serve_forever(0.05)
    server.server_close()
"""


class System:
    """One `serve` in a process of its own, its stand-ins in `folder`."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        self.folder = folder
        options: dict[str, Any] = {
            "port": 0,
            "data_dir": folder / "data",
            "log_format": "json",
            "workers": 0,
        } | settings
        self.settings = Settings(**options)
        self.child("engine", ENGINE)
        self.child("api", API)
        self.started: list[subprocess.Popen[bytes]] = []

    def child(self, name: str, body: str) -> None:
        (self.folder / f"{name}.py").write_text(CHILD.format(name=name, body=body))

    def start(self) -> subprocess.Popen[bytes]:
        environment = os.environ | self.settings.to_env() | {"PYTHONPATH": str(Path.cwd())}
        with (self.folder / "log").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-c", PARENT, str(self.folder)], env=environment, stderr=log
            )
        self.started.append(process)
        return process

    def ready(self) -> str:
        """The URL, as soon as the file has it: there is a moment when it is empty."""
        path = self.folder / "url"
        until(lambda: path.exists() and path.read_text(), self.log)
        return path.read_text()

    def pids(self, name: str) -> list[int]:
        path = self.folder / f"{name}.pids"
        return [int(line) for line in path.read_text().split()] if path.exists() else []

    def pid(self, name: str) -> int:
        """Of the stand-in that runs now; the API may be ready before the engine has said its own."""
        until(lambda: self.pids(name), self.log)
        return self.pids(name)[-1]

    def redis(self) -> Redis:
        return Redis.from_url(embedded_url(self.settings.run_dir))

    def log(self) -> str:
        return (self.folder / "log").read_text()


def alive(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


@pytest.fixture
def system(tmp_path: Path) -> Iterator[System]:
    it = System(tmp_path)
    yield it
    for process in it.started:
        if process.poll() is None:
            process.kill()
        process.wait(PATIENCE)


def test_it_starts_and_stops_as_one(system: System) -> None:
    parent = system.start()
    assert httpx.get(f"{system.ready()}/readyz").status_code == 200
    children = psutil.Process(parent.pid).children()
    assert len(children) == 3
    assert (system.settings.run_dir.stat().st_mode & 0o777) == 0o700

    parent.send_signal(signal.SIGTERM)
    assert parent.wait(PATIENCE) == 0
    assert not any(alive(child.pid) for child in children)


def test_what_valkey_acknowledged_survives_kill_9_of_all(system: System) -> None:
    parent = system.start()
    system.ready()
    system.redis().set("acknowledged", "yes")
    children = psutil.Process(parent.pid).children()
    parent.kill()
    until(lambda: not any(alive(child.pid) for child in children))  # nobody outlives the parent

    (system.folder / "url").unlink()
    system.start()
    system.ready()
    assert system.redis().get("acknowledged") == b"yes"


@pytest.mark.parametrize("name", ["engine", "api", "valkey"])
def test_a_killed_child_is_restarted(name: str, system: System) -> None:
    parent = system.start()
    url = system.ready()
    before = {child.pid for child in psutil.Process(parent.pid).children()}
    if name == "valkey":
        victim = system.redis().info("server")["process_id"]
    else:
        victim = system.pid(name)
    os.kill(victim, signal.SIGKILL)

    until(lambda: len({c.pid for c in psutil.Process(parent.pid).children()} - before) == 1, system.log)
    assert httpx.get(f"{url}/readyz", timeout=10).status_code == 200  # waited in the backlog, if it had to
    until(lambda: system.redis().ping() if name != "valkey" else True)
    assert f"The {name} process was ended by SIGKILL" in system.log()


def test_several_api_processes_share_the_port_and_come_back_each(tmp_path: Path) -> None:
    system = System(tmp_path, api_processes=3)
    system.child("api", f"(folder / f'number-{{os.getpid()}}').write_text(str(settings.api_number)){API}")
    parent = system.start()

    def numbers() -> dict[int, int]:
        return {pid: int((tmp_path / f"number-{pid}").read_text()) for pid in system.pids("api")}

    try:
        url = system.ready()
        until(lambda: len(system.pids("api")) == 3, system.log)
        until(lambda: sorted(numbers().values()) == [0, 1, 2])
        victim, number = next((pid, number) for pid, number in numbers().items() if number == 1)
        os.kill(victim, signal.SIGKILL)
        for _ in range(20):  # whoever is alive answers
            assert httpx.get(f"{url}/readyz", timeout=10).status_code == 200
        until(lambda: len(system.pids("api")) == 4, system.log)
        assert numbers()[system.pids("api")[-1]] == number
        assert "The api 2 process was ended by SIGKILL" in system.log()
        parent.send_signal(signal.SIGTERM)
        assert parent.wait(PATIENCE) == 0
        assert not any(map(alive, system.pids("api")))
    finally:
        parent.kill()
        parent.wait(PATIENCE)


def test_workers_come_after_readiness_and_come_back_when_they_die(tmp_path: Path) -> None:
    system = System(tmp_path, workers=2)
    system.child("worker", f"assert (folder / 'url').exists(); {ENGINE}")
    parent = system.start()
    try:
        system.ready()
        until(lambda: len(system.pids("worker")) == 2, system.log)
        first = system.pids("worker")[0]
        os.kill(first, signal.SIGKILL)
        until(lambda: len(system.pids("worker")) == 3, system.log)
        assert re.search(r"The worker [12] process was ended by SIGKILL", system.log())
        parent.send_signal(signal.SIGTERM)
        assert parent.wait(PATIENCE) == 0
        assert not any(map(alive, system.pids("worker")))
        assert "failed" not in system.log()
    finally:
        parent.kill()
        parent.wait(PATIENCE)


def test_the_api_drains_while_a_worker_saves(tmp_path: Path) -> None:
    system = System(tmp_path, workers=1)
    saving = "signal.signal(signal.SIGTERM, lambda *_: (time.sleep(2), sys.exit())); time.sleep(600)"
    system.child("worker", saving)
    parent = system.start()
    try:
        system.ready()
        system.pid("worker")
        parent.send_signal(signal.SIGTERM)
        until(lambda: not alive(system.pid("api")), system.log)
        assert alive(system.pid("worker"))
        assert alive(system.pid("engine"))
        assert parent.wait(PATIENCE) == 0
    finally:
        parent.kill()
        parent.wait(PATIENCE)


def test_requests_in_flight_are_drained(system: System) -> None:
    parent = system.start()
    url = system.ready()
    with subprocess.Popen(
        [sys.executable, "-c", f"import httpx; print(httpx.get('{url}/slow').text)"], stdout=subprocess.PIPE
    ) as client:
        until((system.folder / "asked").exists, system.log)
        parent.send_signal(signal.SIGTERM)
        out, _ = client.communicate(timeout=PATIENCE)
    assert out.strip() == b"ok"
    assert parent.wait(PATIENCE) == 0


def test_a_second_signal_ends_it_at_once(system: System) -> None:
    system.child("api", API.replace("threading.Thread(target=server.shutdown).start()", "None"))
    parent = system.start()
    system.ready()
    parent.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    assert parent.poll() is None  # drains: this API does not want to go
    parent.send_signal(signal.SIGTERM)
    parent.wait(20)  # of drain_seconds, 30
    assert not any(alive(pid) for name in ("engine", "api") for pid in system.pids(name))


def test_a_refusal_is_one_sentence_and_no_restart(system: System) -> None:
    system.child("engine", "from server.errors import StartupError; raise StartupError('No such model.')")
    parent = system.start()
    assert parent.wait(PATIENCE) == 1
    assert "No such model." in system.log()
    assert "Traceback" not in system.log()
    assert len(system.pids("engine")) == 1


def test_a_crash_before_the_first_readiness_ends_it(system: System) -> None:
    system.child("engine", "os._exit(3)")
    system.child("api", "time.sleep(600)")  # not ready before the engine is
    assert system.start().wait(PATIENCE) == 1
    assert "The engine process ended with status 3 before the server was ready." in system.log()


def test_a_second_serve_on_the_same_data_is_refused(system: System) -> None:
    first = system.start()
    system.ready()
    second = system.start()
    assert second.wait(PATIENCE) == 1
    assert "is in use by another polypeft serve" in system.log()
    assert first.poll() is None


def test_a_taken_port_is_a_sentence(system: System) -> None:
    system.start()
    port = int(system.ready().rpartition(":")[2])
    system.settings = system.settings.model_copy(update={"port": port, "data_dir": system.folder / "other"})
    assert system.start().wait(PATIENCE) == 1
    assert f"Cannot listen on 127.0.0.1:{port}" in system.log()


def test_a_redis_url_is_used_and_nothing_is_embedded(system: System, valkey_url: str) -> None:
    system.settings = system.settings.model_copy(update={"redis_url": valkey_url})
    parent = system.start()
    system.ready()
    assert len(psutil.Process(parent.pid).children()) == 2


@pytest.mark.anyio
async def test_a_dead_redis_url_is_a_sentence_without_its_password() -> None:
    with pytest.raises(StartupError, match=r"127\.0\.0\.1:1.* did not answer within 0\.1 s") as refusal:
        await wait_until_answering("redis://user:hunter2@127.0.0.1:1/0", 0.1)
    assert "hunter2" not in refusal.value.message


@pytest.mark.anyio
async def test_a_valkey_that_reads_its_file_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """It says so itself, however long its file is."""
    answers = [BusyLoadingError("Valkey is loading the dataset in memory")] * 5

    async def ping(_client: AsyncRedis) -> bool:
        if answers:
            raise answers.pop()
        return True

    monkeypatch.setattr(AsyncRedis, "ping", ping)
    await wait_until_answering("redis://127.0.0.1:1/0", 0.0)
    assert not answers


@pytest.mark.anyio
async def test_a_redis_url_of_another_kind_is_a_sentence() -> None:
    with pytest.raises(StartupError, match="is not a redis://"):
        await wait_until_answering("http://127.0.0.1:1", 0.1)


def test_a_long_data_dir_gets_a_short_run_dir(tmp_path: Path) -> None:
    folder = tmp_path / ("d" * 60) / ("e" * 60)
    folder.mkdir(parents=True)
    system = System(folder)
    parent = system.start()
    try:
        system.ready()
        assert len(str(system.settings.run_dir / "valkey.sock")) < 108
    finally:
        parent.terminate()
        parent.wait(PATIENCE)


def test_log_lines_name_their_process(system: System) -> None:
    parent = system.start()
    system.ready()
    os.kill(system.pid("engine"), signal.SIGKILL)
    until(lambda: "SIGKILL" in system.log())
    lines = [json.loads(line) for line in system.log().splitlines()]
    assert any(line["process"] == "serve" and line["level"] == "error" for line in lines)
    assert parent.poll() is None


def test_figures_begin_with_a_serve_and_each_worker_has_a_port(tmp_path: Path) -> None:
    system = System(tmp_path, workers=2, metrics_port=9400)
    system.child("worker", f"(folder / f'port-{{settings.metrics_port}}').touch(); {ENGINE}")
    system.settings.figures_dir.mkdir(parents=True)
    (system.settings.figures_dir / "engine").write_text("of an earlier serve")
    parent = system.start()
    try:
        system.ready()
        assert system.settings.figures_dir.is_dir()
        assert not any(system.settings.figures_dir.iterdir())
        told = psutil.Process(system.pid("api")).environ()
        assert told[MULTIPROCESS] == str(system.settings.figures_dir)
        assert MULTIPROCESS not in psutil.Process(system.pid("engine")).environ()
        until(
            lambda: {path.name for path in tmp_path.glob("port-*")} == {"port-9400", "port-9401"}, system.log
        )
    finally:
        parent.send_signal(signal.SIGTERM)
        parent.wait(PATIENCE)


# beats, and then stands still altogether; the next one beats on
FROZEN = """
    import zmq
    from server.messages import Beat, beat_address, encode
    socket = zmq.Context().socket(zmq.PUB)
    socket.bind(beat_address(settings.engine_socket))
    first = len((folder / "engine.pids").read_text().split()) == 1
    while True:
        time.sleep(0.1)
        socket.send(encode(Beat("boot", 0.0, 0.0)))
        if first and (folder / "freeze").exists():
            os.kill(os.getpid(), signal.SIGSTOP)
"""


def test_an_engine_that_is_silent_for_longer_than_any_request_is_killed(tmp_path: Path) -> None:
    system = System(tmp_path, request_seconds=2.0)
    system.child("engine", FROZEN)
    parent = system.start()
    try:
        system.ready()
        first = system.pid("engine")
        time.sleep(4.0)  # it is heard all the time
        assert alive(first)
        (tmp_path / "freeze").touch()
        until(lambda: len(system.pids("engine")) == 2, system.log)
        said = [json.loads(line)["message"] for line in system.log().splitlines()]
        killed = [line for line in said if f"The engine process {first} has been silent for" in line]
        assert len(killed) == 1
        time.sleep(4.0)
        assert alive(system.pid("engine"))
    finally:
        parent.terminate()
        parent.wait(PATIENCE)


def test_an_engine_that_has_not_been_heard_yet_is_waited_for(tmp_path: Path) -> None:
    """It loads a model, and may take any time for that."""
    system = System(tmp_path, request_seconds=0.5)
    parent = system.start()
    try:
        system.ready()
        first = system.pid("engine")
        time.sleep(4.0)
        assert system.pids("engine") == [first]
    finally:
        parent.terminate()
        parent.wait(PATIENCE)
