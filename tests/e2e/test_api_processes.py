"""Several API processes on one port and one engine: each serves all, and one's death is nobody else's."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path

import httpx
import openai
import psutil
import pytest

from tests.e2e.conftest import OPTIONS
from tests.e2e.serving import Serving, ask, body
from tests.waiting import until

PROMPT = "What is the capital of France?"
LONG = 480  # tokens: a stream that is still running when something happens
MOST = 64  # streams until each process has one


@pytest.fixture(scope="module")
def _server(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    folder = tmp_path_factory.mktemp("processes")
    it = Serving(str(tiny), folder, *OPTIONS, "--api-processes", "2", "--workers", "0")
    try:
        yield it
        if it.running:
            it.stop()
    finally:
        it.end()


@pytest.fixture
def server(_server: Serving) -> Serving:
    """Running, with both its processes, whatever the test before did to them."""
    if not _server.running:
        _server.start()
    until(lambda: len(_server.pids_of("api")) == 2, _server.log)
    until(lambda: both_answer(_server), _server.log)
    return _server


def both_answer(server: Serving) -> bool:
    """Whether each process has one of a few new connections."""
    with ExitStack() as stack, suppress(httpx.TransportError):
        for _ in range(8):
            stack.enter_context(server.http()).get("/healthz")
        return all(connections(server))
    return False


class Stream:
    """One stream of the SDK on a connection of its own, read by a thread."""

    def __init__(self, server: Serving, key: str) -> None:
        self.text = ""
        self.error: Exception | None = None
        self._sdk = server.sdk(key)
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def begun(self) -> bool:
        return bool(self.text or self.error)

    def end(self) -> None:
        self._thread.join(60)
        assert not self._thread.is_alive()

    def _read(self) -> None:
        asked = body("llama", PROMPT, LONG)
        extra = {"ignore_eos": asked.pop("ignore_eos")}
        try:
            with self._sdk as sdk:
                for chunk in sdk.completions.create(**asked, stream=True, extra_body=extra):
                    self.text += chunk.choices[0].text
        except (openai.APIError, httpx.HTTPError) as error:
            self.error = error


def connections(server: Serving) -> list[int]:
    """Open ones of each API process."""
    port = int(server.url.rpartition(":")[2])
    found = [psutil.Process(pid).net_connections("tcp") for pid in server.pids_of("api")]
    return [sum(c.status == psutil.CONN_ESTABLISHED and c.laddr.port == port for c in own) for own in found]


def streams_on_both(server: Serving, key: str) -> list[Stream]:
    """As many long streams at a time as it takes for each process to have one."""
    streams: list[Stream] = []
    while not all(connections(server)):
        assert len(streams) < MOST
        streams.append(Stream(server, key))
        until(streams[-1].begun)
    return streams


def kill_one(server: Serving) -> None:
    """Returns when another is in its place, which may still be starting."""
    victim = server.pids_of("api")[0]
    os.kill(victim, signal.SIGKILL)
    until(lambda: len(set(server.pids_of("api")) - {victim}) == 2, server.log)


def test_one_is_killed_and_the_other_serves_on(server: Serving) -> None:
    key = server.tenant("alice")
    with server.http(key) as http:
        expected = ask(http, "llama", PROMPT, LONG)
    first, second = server.pids_of("api")
    streams = streams_on_both(server, key)
    os.kill(second, signal.SIGKILL)
    before = server.pids_of("api")
    while server.pids_of("api") == before:
        with server.http(key) as http:  # whoever is there answers
            assert expected.startswith(ask(http, "llama", PROMPT, 4))
    for _ in range(50):  # also while the other begins
        with server.http(key) as http:
            assert expected.startswith(ask(http, "llama", PROMPT, 4))
    for stream in streams:
        stream.end()
    assert any(stream.error for stream in streams)
    assert {stream.text for stream in streams if stream.error is None} <= {expected}
    assert first in server.pids_of("api")
    for stream in streams_on_both(server, key):
        stream.end()
        assert (stream.text, stream.error) == (expected, None)


def test_every_scrape_shows_the_sum_of_all(server: Serving) -> None:
    key = server.tenant("bob")

    def one(_: int) -> int:
        with server.http(key) as http:  # a connection each
            return http.post("/v1/completions", json=body("llama", PROMPT, 8)).status_code

    def counted() -> tuple[float, float]:
        """By the API and by the engine, each on a page of its own."""
        name = "polypeft_http_requests_total"
        lines = [line for line in server.get("/metrics").text.splitlines() if line.startswith(name)]
        requests = sum(float(line.rpartition(" ")[2]) for line in lines if "/v1/completions" in line)
        return requests, server.gauge("vllm:generation_tokens_total")

    until(lambda: server.gauge("vllm:num_requests_running") == 0)
    time.sleep(2)  # the engine tells its figures once a second
    requests, tokens = counted()
    with ThreadPoolExecutor(8) as pool:
        for asked in (24, 48):
            assert set(pool.map(one, range(24))) == {200}
            expected = (requests + asked, tokens + 8 * asked)
            until(lambda: counted() == expected, lambda: f"{counted()} is not {expected}")  # noqa: B023
            assert {counted() for _ in range(8)} == {expected}
            kill_one(server)
            end = time.monotonic() + 6  # while another starts, and takes its first scrapes
            while time.monotonic() < end:
                assert counted() == expected
    assert server.gauge("polypeft_engine_up") == 1


def test_streams_of_all_may_finish_after_sigterm(server: Serving) -> None:
    streams = streams_on_both(server, server.tenant("carol"))
    server.stop()
    for stream in streams:
        stream.end()
    assert [stream.error for stream in streams] == [None] * len(streams)
    assert len({stream.text for stream in streams}) == 1
