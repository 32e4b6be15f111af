"""Processes that die, and starts that cannot be: what clients see meanwhile, and that all comes back."""

import json
import os
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.e2e.serving import Serving, alive, ask, body, push
from tests.waiting import PATIENCE, until

PROMPT = "What is the capital of France?"
LONG = 480  # tokens: a stream that is still running when something dies
Golden = Callable[..., str]
Lora = Callable[[int], Path]


@pytest.fixture
def server(mortal: Serving) -> Serving:
    return mortal


@pytest.fixture
def http(server: Serving, request: pytest.FixtureRequest, lora: Lora) -> Iterator[httpx.Client]:
    """Of a new tenant with the adapter `poet`."""
    key = server.tenant(request.node.name[:40])
    with server.http(key) as client:
        push(client, "poet", lora(0))
        yield client


def events(answer: httpx.Response) -> Iterator[str]:
    for line in answer.iter_lines():
        if line:
            yield line.removeprefix("data: ")


def long_stream(http: httpx.Client, model: str = "poet") -> Any:
    return http.stream("POST", "/v1/completions", json=body(model, PROMPT, LONG, stream=True))


def code_of(answer: httpx.Response) -> str:
    code: str = answer.json()["error"]["code"]
    return code


def still_right(http: httpx.Client, golden: Golden, lora: Lora) -> None:
    for model, adapter in (("poet", lora(0)), ("llama", None)):
        assert ask(http, model, PROMPT) == golden(adapter, PROMPT)


def test_a_killed_engine_ends_its_streams_in_an_error_event(
    server: Serving, http: httpx.Client, golden: Golden, lora: Lora
) -> None:
    engine = server.pid("engine")
    with long_stream(http) as answer:
        lines = events(answer)
        json.loads(next(lines))
        os.kill(engine, signal.SIGKILL)
        last = [json.loads(line) for line in lines][-1]
    assert last["error"]["code"] == "engine_lost"
    ready = server.get("/readyz")
    assert (ready.status_code, ready.json()["checks"]["engine"]) == (503, False)
    assert server.get("/healthz").status_code == 200
    refusal = http.post("/v1/completions", json=body("poet", PROMPT))
    assert (refusal.status_code, code_of(refusal)) == (503, "unavailable")
    assert refusal.headers["retry-after"]
    assert http.get("/v1/models").status_code == 200
    until(server.ready, server.log)
    still_right(http, golden, lora)


def test_an_engine_that_stands_still_for_a_while_loses_nothing(
    server: Serving, http: httpx.Client, golden: Golden, lora: Lora
) -> None:
    """Slow is not dead: SIGSTOP is what swap, a throttled container or a long step look like from outside."""
    whole = ask(http, "poet", PROMPT, LONG)
    engine, said = server.pid("engine"), ""
    with long_stream(http) as answer, ThreadPoolExecutor(1) as pool:
        lines = events(answer)
        said += json.loads(next(lines))["choices"][0]["text"]
        os.kill(engine, signal.SIGSTOP)
        try:
            during = pool.submit(http.post, "/v1/completions", json=body("poet", PROMPT))
            time.sleep(8)
            assert server.get("/healthz").status_code == 200
            assert server.get("/readyz").json()["engine"]["silent_seconds"] > 5
            assert not during.done()
        finally:
            os.kill(engine, signal.SIGCONT)
        rest = [line for line in lines if line != "[DONE]"]
        said += "".join(choice["text"] for line in rest for choice in json.loads(line)["choices"])
        assert during.result().status_code == 200
    assert said == whole
    assert server.pid("engine") == engine
    until(server.ready, server.log)
    still_right(http, golden, lora)


def test_a_killed_api_comes_back_on_its_port_with_all_it_had(
    server: Serving, http: httpx.Client, golden: Golden, lora: Lora
) -> None:
    with long_stream(http) as answer:
        lines = events(answer)
        next(lines)
        cut = server.data_dir / "incoming" / "of an upload"
        cut.mkdir()
        server.kill("api")
        with pytest.raises(httpx.TransportError):
            list(lines)
    until(server.ready, server.log)
    until(lambda: server.gauge("vllm:num_requests_running") == 0)  # nobody reads that row
    assert not cut.exists()
    assert http.get("/v1/adapters/poet").status_code == 200
    still_right(http, golden, lora)


def test_a_killed_valkey_loses_nothing_it_acknowledged(
    server: Serving, http: httpx.Client, golden: Golden, lora: Lora
) -> None:
    key = server.tenant("acknowledged")
    assert http.post("/v1/adapters/poet/aliases", json={"alias": "live", "version": 1}).status_code == 200
    server.kill("valkey")
    seen = set()
    for _ in range(10):
        answer = http.post("/v1/completions", json=body("poet", PROMPT))
        seen.add(answer.status_code)
        if answer.status_code == 200:
            assert answer.json()["choices"][0]["text"] == golden(lora(0), PROMPT)
        else:
            assert code_of(answer) == "store_unavailable"
            assert answer.headers["retry-after"]
    assert seen <= {200, 503}
    until(server.ready, server.log)
    with server.http(key) as other:
        assert other.get("/v1/models").status_code == 200
        assert other.get("/v1/adapters/poet").status_code == 404
    assert ask(http, "poet@live", PROMPT) == golden(lora(0), PROMPT)
    still_right(http, golden, lora)


def test_a_stopped_valkey_lets_nobody_in_and_nothing_hang(server: Serving, http: httpx.Client) -> None:
    """It does not answer, which is worse than not being there."""
    stranger = "pp-" + "x" * 43
    valkey = psutil.Process(server.pid("valkey"))
    valkey.suspend()
    try:
        assert server.get("/readyz").status_code == 503
        with ThreadPoolExecutor() as pool:
            known = pool.submit(http.post, "/v1/completions", json=body("poet", PROMPT))
            unknown = pool.submit(server.get, "/v1/models", stranger)
            assert [known.result().status_code, unknown.result().status_code] == [503, 503]
    finally:
        valkey.resume()
    until(server.ready, server.log)
    assert server.get("/v1/models", stranger).status_code == 401
    assert ask(http, "poet", PROMPT)


def test_nothing_outlives_a_killed_supervisor_and_all_is_there_after(
    server: Serving, http: httpx.Client, golden: Golden, lora: Lora
) -> None:
    children = server.pids()
    key = http.headers["authorization"].removeprefix("Bearer ")
    server.process.kill()
    server.process.wait(PATIENCE)
    until(lambda: not any(map(alive, children)))
    server.start()
    with server.http(key) as client:
        still_right(client, golden, lora)


def test_sigterm_finishes_streams_and_takes_nothing_new(server: Serving, http: httpx.Client) -> None:
    whole = ask(http, "poet", PROMPT, LONG)
    found: list[str] = []
    began = threading.Event()

    def read() -> None:
        with long_stream(http) as answer:
            for line in events(answer):
                found.append(line)
                began.set()

    thread = threading.Thread(target=read)
    with server.http(http.headers["authorization"].removeprefix("Bearer ")) as second:
        assert second.get("/v1/models").status_code == 200  # its connection is open
        thread.start()
        assert began.wait(PATIENCE)
        stopping = threading.Thread(target=server.stop)
        stopping.start()
        refusal = None
        while thread.is_alive() and refusal is None:
            answer = second.post("/v1/completions", json=body("poet", PROMPT))
            refusal = answer if answer.status_code == 503 else None
        assert refusal is not None, "the stream ended before it was asked"
        thread.join(PATIENCE)
        stopping.join(PATIENCE)
    assert found[-1] == "[DONE]"
    assert "".join(json.loads(line)["choices"][0]["text"] for line in found[:-1]) == whole
    assert not server.running


def refused(process: "subprocess.Popen[bytes]", log: Callable[[], str]) -> str:
    """What it says on its way out, which must be one sentence."""
    start = len(log())
    assert process.wait(PATIENCE) == 1, log()
    said = log()[start:] or log()
    assert "Traceback" not in said
    return said


def test_a_second_serve_on_the_same_data_is_refused(server: Serving, http: httpx.Client) -> None:
    said = refused(server.launch(), server.log)
    assert "is in use by another polypeft serve" in said
    assert ask(http, "poet", PROMPT)


def test_a_taken_port_is_refused(tiny: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        it = Serving(str(tiny), tmp_path, "--port", str(port))
        said = refused(it.launch(), it.log)
    assert f"Cannot listen on 127.0.0.1:{port}" in said


def test_a_model_that_cannot_be_served_is_refused_by_name(tiny: Path, tmp_path: Path) -> None:
    def config(folder: Path, **fields: Any) -> str:
        """A model that has everything but an architecture of ours."""
        shutil.copytree(tiny, folder)
        (folder / "config.json").write_text(json.dumps(fields))
        return str(folder)

    models = {
        "no/such/thing": "no/such/thing",
        str(tmp_path): tmp_path.name,
        config(tmp_path / "mamba", model_type="mamba", architectures=["MambaForCausalLM"]): "Mamba",
    }
    for number, (model, named) in enumerate(models.items()):
        it = Serving(model, tmp_path / str(number))
        (tmp_path / str(number)).mkdir()
        assert named.lower() in refused(it.launch(), it.log).lower()
