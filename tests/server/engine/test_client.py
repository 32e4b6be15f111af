"""What the API may rely on, whichever engine is behind the socket.

`engine` yields a running engine's client; the real engine process joins by adding a parameter.
"""

import asyncio
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing, asynccontextmanager

import pytest

from server.adapters.sites import Base, Site
from server.engine import messages as m
from server.engine.client import EngineClient
from server.engine.fake import FakeEngine
from server.errors import DeadlineExceeded, EngineLost, NonFinite, Unavailable

BASE = Base(
    "toy", "llama", "d" * 64, 2, 16, 2, 8, 100, 256, {"wte": Site("wte", "embedding", 100, 16, False)}
)
ADAPTER = m.AdapterRef("ten_a", "mine", 1, "a" * 64, "lora", "manifests/a")


pytestmark = pytest.mark.anyio


@pytest.fixture
def address() -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="pp") as folder:  # a socket's path has 108 bytes at most
        yield f"ipc://{folder}/e.sock"


@asynccontextmanager
async def running(address: str) -> AsyncIterator[tuple[FakeEngine, EngineClient]]:
    engine, client = FakeEngine(address, BASE), EngineClient(address)
    await engine.start()
    await client.start()
    await until(lambda: client.ready)
    try:
        yield engine, client
    finally:
        await client.close()
        await engine.close()


async def until(condition: Callable[[], bool], seconds: float = 5.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        await asyncio.sleep(0.01)


def row(row_id: str = "r1", max_tokens: int = 8, **fields: object) -> m.Generate:
    sampling = m.Sampling(max_tokens=max_tokens, temperature=0.0)
    return m.Generate(row_id, "ten_a", [1, 2, 3], sampling, **fields)  # type: ignore[arg-type]


async def collect(client: EngineClient, *rows: m.Generate) -> dict[str, list[int]]:
    tokens: dict[str, list[int]] = {r.id: [] for r in rows}
    finishes = []
    async for chunk in client.generate(*rows):
        tokens[chunk.id] += chunk.tokens
        finishes += [chunk.id] if chunk.finish else []
    assert sorted(finishes) == sorted(tokens), "each row finishes exactly once"
    return tokens


async def test_ready_tells_base_and_limits(address: str) -> None:
    async with running(address) as (_, client):
        assert client.base == BASE
        assert client.limits["max_seqs"] == 32


async def test_rows_end_with_their_tokens_and_repeat_them(address: str) -> None:
    async with running(address) as (_, client):
        first = await collect(client, row("a"), row("b", 3), row("c", adapter=ADAPTER))
        again = await collect(client, row("a"), row("c", adapter=ADAPTER))
        assert [len(first[k]) for k in "abc"] == [8, 3, 8]
        assert again["a"] == first["a"] != first["c"] == again["c"]
        assert first["b"] == first["a"][:3]
        assert client.rows == 0


async def test_closing_the_stream_cancels_the_rows(address: str) -> None:
    async with running(address) as (engine, client):
        engine.behaviour.step_seconds = 0.01
        async with aclosing(client.generate(row("a", 200), row("b", 200))) as chunks:
            await anext(chunks)
        await until(lambda: sorted(engine.cancelled) == ["a", "b"] and engine.running == 0)
        assert client.rows == 0


async def test_a_cancelled_task_cancels_the_row(address: str) -> None:
    async with running(address) as (engine, client):
        engine.behaviour.step_seconds = 0.01
        task = asyncio.create_task(collect(client, row("a", 200)))
        await until(lambda: engine.running == 1)
        task.cancel()
        await until(lambda: engine.cancelled == ["a"] and engine.running == 0)


async def test_a_failed_row_raises_its_error_and_no_other_does(address: str) -> None:
    async with running(address) as (engine, client):
        engine.behaviour.fail_digest = ADAPTER.digest
        bad, good = await asyncio.gather(
            collect(client, row("bad", adapter=ADAPTER)), collect(client, row("good")), return_exceptions=True
        )
        assert isinstance(bad, NonFinite)
        assert isinstance(good, dict)


async def test_a_dead_engine_ends_every_row_at_once_and_its_successor_serves(address: str) -> None:
    async with running(address) as (engine, client):
        engine.behaviour.step_seconds = 0.01
        tasks = [asyncio.create_task(collect(client, row(str(i), 200))) for i in range(4)]
        await until(lambda: engine.running == 4)
        started = time.monotonic()
        await engine.crash()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(r, EngineLost) for r in results)
        assert time.monotonic() - started < 2
        assert not client.ready
        with pytest.raises(Unavailable):
            await collect(client, row("x"))
        await engine.start()
        await until(lambda: client.ready)
        engine.behaviour.step_seconds = 0
        assert len((await collect(client, row("y")))["y"]) == 8


async def test_a_silent_engine_counts_as_dead(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.engine.client.SILENCE_SECONDS", 0.6)
    async with running(address) as (engine, client):
        engine.behaviour.mute = True
        with pytest.raises(EngineLost):
            await collect(client, row())
        engine.behaviour.mute = False
        await until(lambda: client.ready)


async def test_the_deadline_ends_a_row_by_the_engine_or_without_it(address: str) -> None:
    async with running(address) as (engine, client):
        engine.behaviour.step_seconds = 0.05
        for mute in (False, True):
            engine.behaviour.mute = mute
            started = time.time()
            with pytest.raises(DeadlineExceeded):
                await collect(client, row("late", 200, deadline=started + 0.3))
            assert time.time() - started < 1.3


async def test_check_returns_facts_or_the_refusal(address: str) -> None:
    async with running(address) as (engine, client):
        assert (await client.check(b"{}")).facts == {"parameters": 1}
        engine.behaviour.refuse = ("invalid_adapter", "No.", "files")
        assert (await client.check(b"{}")).error == ("invalid_adapter", "No.", "files")


async def test_stats_arrive(address: str) -> None:
    async with running(address) as (_, client):
        await collect(client, row())
        await until(lambda: client.stats is not None and client.stats.counters["generation_tokens"] == 8)


async def test_forget_reaches_the_engine(address: str) -> None:
    async with running(address) as (engine, client):
        client.forget("f" * 64)
        await until(lambda: engine.forgotten == ["f" * 64])


async def test_a_client_that_starts_first_finds_the_engine_later(address: str) -> None:
    engine, client = FakeEngine(address, BASE), EngineClient(address)
    await client.start()
    assert not client.ready
    await engine.start()
    await until(lambda: client.ready)
    await client.close()
    await engine.close()
