"""What the API may rely on, whichever engine is behind the socket: the fake, and the real process.

Tests of what only a fake can be made to do, such as saying nothing, run one of their own.
"""

import asyncio
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import aclosing, asynccontextmanager, contextmanager
from pathlib import Path

import msgspec
import pytest
import zmq

from server import messages as m
from server.adapters.sites import Base, Site
from server.engine.client import EngineClient
from server.engine.fake import Behaviour, FakeEngine
from server.errors import (
    DeadlineExceeded,
    EngineLost,
    ModelNotFound,
    NonFinite,
    PolypeftError,
    QueueFull,
    TenantQueueFull,
    Unavailable,
)
from server.settings import Settings, child_environment
from tests.waiting import eventually

BASE = Base(
    "toy", "llama", "d" * 64, 2, 16, 2, 8, 100, 256, {"wte": Site("wte", "embedding", 100, 16, False)}
)
ADAPTER = m.AdapterRef("ten_a", "mine", 1, "a" * 64, "lora", "manifests/a")
LONG = 400  # tokens: a row that is still running when something happens to it


pytestmark = pytest.mark.anyio


class Fake:
    """The fake engine. Slow where a test wants rows that take their time."""

    base_id = "toy"
    bad_adapter: type[PolypeftError] = NonFinite

    def __init__(self, address: str) -> None:
        self.address = address
        self.engine = FakeEngine(address, BASE)
        self.engine.behaviour.fail_digest = ADAPTER.digest

    async def start(self) -> None:
        self.engine.behaviour.step_seconds = 0.002
        await self.engine.start()

    async def crash(self) -> None:
        await self.engine.crash()


class Real:
    """`python -m server.engine` over a tiny model. Its store is empty: an adapter cannot be loaded."""

    base_id = "llama"
    bad_adapter: type[PolypeftError] = ModelNotFound

    def __init__(self, settings: Settings) -> None:
        self.address = settings.engine_socket
        self._environment = child_environment(settings)
        self._process: subprocess.Popen[bytes] | None = None

    async def start(self) -> None:
        if self._process is None:
            self._process = self._launch()

    async def crash(self) -> None:
        if self._process is not None:
            os.kill(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def _launch(self) -> "subprocess.Popen[bytes]":
        return subprocess.Popen([sys.executable, "-m", "server.engine"], env=self._environment)


@pytest.fixture
def address() -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="pp") as folder:  # a socket's path has 108 bytes at most
        yield f"ipc://{folder}/e.sock"


@pytest.fixture(scope="module")
def process(tiny_models: Callable[[str], Path]) -> Iterator[Real]:
    """One for the whole module: it starts in seconds."""
    with tempfile.TemporaryDirectory(prefix="pp") as folder:
        settings = Settings(
            model=str(tiny_models("llama")), data_dir=Path(folder), threads=1, kv_bytes=8 << 20
        )
        settings.run_dir.mkdir()
        it = Real(settings)
        yield it
        asyncio.run(it.crash())


@pytest.fixture(params=["fake", "real"])
async def engine(request: pytest.FixtureRequest, address: str) -> AsyncIterator[Fake | Real]:
    if request.param == "real":
        process: Real = request.getfixturevalue("process")
        await process.start()
        yield process
        return
    fake = Fake(address)
    await fake.start()
    yield fake
    await fake.crash()


@asynccontextmanager
async def connected(engine: Fake | Real) -> AsyncIterator[EngineClient]:
    client = EngineClient(engine.address)
    await client.start()
    await eventually(lambda: client.ready)
    try:
        yield client
    finally:
        await client.close()


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


@asynccontextmanager
async def running(address: str) -> AsyncIterator[tuple[FakeEngine, EngineClient]]:
    engine, client = FakeEngine(address, BASE), EngineClient(address)
    await engine.start()
    await client.start()
    await eventually(lambda: client.ready)
    try:
        yield engine, client
    finally:
        await client.close()
        await engine.close()


def row(
    row_id: str = "r1", max_tokens: int = 8, prompt: Sequence[int] = (1, 2, 3), **fields: object
) -> m.Generate:
    sampling = m.Sampling(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
    return m.Generate(row_id, "ten_a", list(prompt), sampling, **fields)  # type: ignore[arg-type]


def rows_running(client: EngineClient) -> float | None:
    """As the engine says once a second; None before its first word."""
    return client.stats.gauges["running"] if client.stats else None


def generated(client: EngineClient) -> float:
    return client.stats.counters["generation_tokens"] if client.stats else 0.0


async def collect(client: EngineClient, *rows: m.Generate) -> dict[str, list[int]]:
    tokens: dict[str, list[int]] = {r.id: [] for r in rows}
    finishes = []
    async for chunk in client.generate(*rows):
        tokens[chunk.id] += chunk.tokens
        finishes += [chunk.id] if chunk.finish else []
    assert sorted(finishes) == sorted(tokens), "each row finishes exactly once"
    return tokens


async def test_ready_tells_base_and_limits(engine: Fake | Real) -> None:
    async with connected(engine) as client:
        assert client.base is not None
        assert client.base.id == engine.base_id
        assert client.limits["max_seqs"] == 32


async def test_rows_end_with_their_tokens_and_repeat_them(engine: Fake | Real) -> None:
    async with connected(engine) as client:
        first = await collect(client, row("a"), row("b", 3), row("c", prompt=[3, 2, 1]))
        again = await collect(client, row("a"), row("c", prompt=[3, 2, 1]))
        assert [len(first[k]) for k in "abc"] == [8, 3, 8]
        assert again["a"] == first["a"] != first["c"] == again["c"]
        assert first["b"] == first["a"][:3]
        assert client.rows == 0


async def test_a_fake_adapter_gives_other_tokens_than_the_base(address: str) -> None:
    async with running(address) as (_, client):
        tokens = await collect(client, row("base"), row("adapted", adapter=ADAPTER))
        assert tokens["base"] != tokens["adapted"]


async def test_closing_the_stream_cancels_the_rows(engine: Fake | Real) -> None:
    async with connected(engine) as client:
        async with aclosing(client.generate(row("a", LONG), row("b", LONG))) as chunks:
            await anext(chunks)
        assert client.rows == 0
        await eventually(lambda: rows_running(client) == 0, 2)


async def test_one_row_of_several_can_be_cancelled(engine: Fake | Real) -> None:
    async with connected(engine) as client:
        finishes: dict[str, m.FinishReason] = {}
        async for chunk in client.generate(row("a", LONG), row("b", 50)):
            client.cancel("a")
            finishes |= {chunk.id: chunk.finish} if chunk.finish else {}
        assert finishes == {"a": "cancelled", "b": "length"}


async def test_a_cancelled_task_cancels_the_row(engine: Fake | Real) -> None:
    async with connected(engine) as client:
        task = asyncio.create_task(collect(client, row("a", LONG)))
        await eventually(lambda: client.rows == 1)
        task.cancel()
        await eventually(lambda: client.rows == 0)
        await eventually(lambda: rows_running(client) == 0, 2)


async def test_a_failed_row_raises_its_error_and_no_other_does(engine: Fake | Real) -> None:
    async with connected(engine) as client:
        bad, good = await asyncio.gather(
            collect(client, row("bad", adapter=ADAPTER)), collect(client, row("good")), return_exceptions=True
        )
        assert isinstance(bad, engine.bad_adapter)
        assert isinstance(good, dict)


async def test_a_request_is_admitted_whole_or_refused_whole(engine: Fake | Real) -> None:
    """288 rows fit, and a tenant may have as many as it leaves free."""
    async with connected(engine) as client:
        with pytest.raises(QueueFull):
            await collect(client, *(row(f"r{i}", prompt=[i % 90 + 1]) for i in range(289)))
        first = [row(f"f{i}", LONG, prompt=[i + 1]) for i in range(80)]
        async with aclosing(client.generate(*first)) as chunks:
            await anext(chunks)
            with pytest.raises(TenantQueueFull):
                await collect(client, *(row(f"s{i}", prompt=[i + 1]) for i in range(70)))
            other = row("other", 1)
            assert await collect(client, msgspec.structs.replace(other, tenant="ten_b"))
        assert client.rows == 0


async def test_a_dead_engine_ends_every_row_at_once_and_its_successor_serves(engine: Fake | Real) -> None:
    async with connected(engine) as client:
        before = await collect(client, row("before"))
        tasks = [asyncio.create_task(collect(client, row(str(i), LONG))) for i in range(4)]
        await eventually(lambda: client.rows == 4)
        started = time.monotonic()
        await engine.crash()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(r, EngineLost) for r in results)
        assert time.monotonic() - started < 5  # its socket tells, long before its silence would
        assert not client.ready
        with pytest.raises(Unavailable):
            await collect(client, row("x"))
        await engine.start()
        await eventually(lambda: client.ready)
        assert (await collect(client, row("after")))["after"] == before["before"]


async def test_a_silent_engine_loses_no_row_and_takes_new_ones(process: Real) -> None:
    """Every thread of the real process stands still, for longer than five seconds were once enough."""
    await process.start()
    async with connected(process) as client:
        expected = await collect(client, row("alone", LONG))
        running = asyncio.create_task(collect(client, row("running", LONG)))
        await eventually(lambda: client.rows == 1)
        with stopped(process.pid):
            during = asyncio.create_task(collect(client, row("during", LONG)))
            check = asyncio.create_task(client.check(b"{}"))
            await asyncio.sleep(7)
            assert client.ready
            assert client.silent_seconds > 5
            assert not any(task.done() for task in (running, during, check))
        assert (await running)["running"] == expected["alone"]
        assert (await during)["during"] == expected["alone"]
        assert (await check).error is not None
        await eventually(lambda: client.silent_seconds < 2)


async def test_a_silent_engine_does_not_answer(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.engine.client.SILENCE_SECONDS", 0.6)
    async with running(address) as (engine, client):
        assert client.responsive
        engine.behaviour.mute = True
        await eventually(lambda: not client.responsive)
        assert client.ready
        engine.behaviour.mute = False
        await eventually(lambda: client.responsive)


async def test_rows_of_a_step_beyond_its_bound_end_and_say_so(address: str) -> None:
    async with running(address) as (engine, client):
        engine.behaviour.step_seconds = 3600.0
        engine.behaviour.step_age_and_bound = (299.0, 300.0)
        task = asyncio.create_task(collect(client, row()))
        await asyncio.sleep(0.5)
        assert not task.done()
        engine.behaviour.step_age_and_bound = (301.0, 300.0)
        with pytest.raises(EngineLost, match=r"has run for 301 s and its bound is 300 s"):
            await task
        engine.behaviour = Behaviour()
        await eventually(lambda: client.ready)


async def test_a_command_that_cannot_be_read_or_obeyed_harms_nobody(process: Real) -> None:
    await process.start()
    async with connected(process) as client:
        task = asyncio.create_task(collect(client, row("long", LONG)))
        with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
            socket.setsockopt(zmq.LINGER, 1000)
            socket.connect(process.address)
            said_by_engines = m.encode(m.Ready("another", b"{}", {}))
            for frames in ([b""], [b"\xff" * 100], [b"\x81", b"x", b"y"], [said_by_engines]):
                socket.send_multipart(frames)
            hurt = msgspec.structs.replace(ADAPTER, digest="/\0/../" * 1000)  # no name for a file
            socket.send(m.encode(m.Prefetch(hurt)))
            socket.send(m.encode(row("bad", adapter=hurt)))
        assert len((await task)["long"]) == LONG
        assert len((await collect(client, row("next")))["next"]) == 8


async def test_the_deadline_ends_a_row(engine: Fake | Real) -> None:
    async with connected(engine) as client:
        started = time.time()
        with pytest.raises(DeadlineExceeded):
            await collect(client, row("late", LONG, deadline=started + 0.1))
        assert time.time() - started < 1.1
        assert len((await collect(client, row("next")))["next"]) == 8


async def test_the_deadline_ends_a_row_of_a_silent_engine(address: str) -> None:
    async with running(address) as (engine, client):
        engine.behaviour.mute = True
        started = time.time()
        with pytest.raises(DeadlineExceeded):
            await collect(client, row("late", 200, deadline=started + 0.3))
        assert time.time() - started < 1.3


async def test_check_returns_facts_or_the_refusal(address: str) -> None:
    async with running(address) as (engine, client):
        assert (await client.check(b"{}")).facts == {"parameters": 1}
        engine.behaviour.refuse = ("invalid_adapter", "No.", "files")
        assert (await client.check(b"{}")).error == ("invalid_adapter", "No.", "files")


async def test_a_check_of_what_is_no_manifest_is_refused_and_harms_nobody(process: Real) -> None:
    await process.start()
    async with connected(process) as client:
        for bad in (b"", b"{}", b"\xff", b"[" * 10_000):
            error = (await client.check(bad)).error
            assert error is not None
            assert error[0] == "invalid_adapter"
        assert len((await collect(client, row()))["r1"]) == 8


async def test_stats_arrive(engine: Fake | Real) -> None:
    async with connected(engine) as client:
        await eventually(lambda: client.stats is not None)
        start = generated(client)
        await collect(client, row())
        await eventually(lambda: generated(client) == start + 8)


async def test_forget_reaches_the_engine(address: str) -> None:
    async with running(address) as (engine, client):
        client.forget("f" * 64)
        await eventually(lambda: engine.forgotten == ["f" * 64])


async def test_a_client_that_starts_first_finds_the_engine_later(address: str) -> None:
    engine, client = FakeEngine(address, BASE), EngineClient(address)
    await client.start()
    assert not client.ready
    await engine.start()
    await eventually(lambda: client.ready)
    await client.close()
    await engine.close()
