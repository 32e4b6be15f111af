"""Entries of many tenants are read as one sequence, from any position, each once."""

import asyncio
import random

import pytest
from redis.asyncio import Redis

from server.audit import audit_log, newest
from server.audit.audit_log import STREAM, AuditLog, Span
from server.audit.entry import Entry, Position
from server.audit.newest import newest_first

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize("seed", range(4))
async def test_the_sequence_is_that_of_a_sort(
    redis: Redis, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    monkeypatch.setattr(newest, "READ_AT_ONCE", 12)
    monkeypatch.setattr(newest, "TENANTS_AT_ONCE", 3)
    rng = random.Random(seed)
    now = int((await redis.time())[0]) * 1000
    tenants = [f"ten_{number}" for number in range(rng.randrange(1, 9))]
    every = []
    for tenant in tenants:
        times = sorted(rng.choices(range(now - 40, now), k=rng.randrange(60)))
        for number, at in enumerate(times):  # of one time, tenants have the same numbers
            position = Position(at, times[:number].count(at), tenant)
            await redis.xadd(
                f"{STREAM}{tenant}", {"entry": b'{"actor":"a","by":"b","action":"c"}'}, id=position.stream_id
            )
            every.append(position)
    every.sort(key=lambda position: position.order)
    log = AuditLog(redis, days=90, max_entries=1000)
    for start in [None, *rng.sample(every, min(10, len(every)))]:
        found = [recorded.position async for recorded in newest_first(log, tenants, Span(), start)]
        assert found == (every if start is None else every[every.index(start) + 1 :])
    since, until = now - 30, now - 10
    span = Span(since / 1000, until / 1000)
    found = [recorded.position async for recorded in newest_first(log, tenants, span)]
    assert found == [position for position in every if since <= position.milliseconds <= until]


async def test_no_tenant_has_no_entries(redis: Redis) -> None:
    log = AuditLog(redis, days=90, max_entries=1000)
    assert [recorded async for recorded in newest_first(log, [], Span())] == []
    assert [recorded async for recorded in newest_first(log, ["ten_none"], Span())] == []


async def test_an_answer_waits_for_its_entry_a_moment_only(
    redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here not at all: the outcome is written all the same, and not lost to `settle_lost`."""
    monkeypatch.setattr(audit_log, "END_SECONDS", 0)
    log = AuditLog(redis, days=90, max_entries=1000)
    entry = Entry(actor="a", by="ten_a", action="key.create", outcome="done")
    await log.begin("token", "ten_a", entry)
    await log.end("token", "ten_a", entry)
    monkeypatch.undo()
    await log.close()
    [recorded] = [recorded async for recorded in newest_first(log, ["ten_a"], Span())]
    assert recorded.entry.outcome == "done"


async def test_an_entry_comes_once_however_often_its_end_is_sent(redis: Redis) -> None:
    log = AuditLog(redis, days=90, max_entries=1000)
    entry = Entry(actor="a", by="ten_a", action="key.create")
    await log.begin("token", "ten_a", entry)
    await asyncio.gather(*(log.end("token", "ten_a", entry) for _ in range(20)), log.settle_lost(-1))
    assert len([recorded async for recorded in newest_first(log, ["ten_a"], Span())]) == 1
