"""The sums in Valkey: each record counts once, however its journal is cut into calls, and how often."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from redis.asyncio import Redis

from server.usage import counts_lua
from server.usage.counts import Counts
from server.usage.counts_lua import JOURNALS
from server.usage.record import CANCELLED, CUT, Amounts, Group, Record
from tests.server.usage.records import DAY, record, summed, sums_of

pytestmark = pytest.mark.anyio

RECORDS = st.builds(
    lambda adapter, key, tokens, outcome: (adapter, key, tokens, outcome),
    st.sampled_from(["", "poet@1", "poet@2"]),
    st.sampled_from(["key_1", "key_2"]),
    st.integers(0, 1 << 40),
    st.sampled_from(["completed", CANCELLED, CUT, "engine_lost"]),
)


def made(given_records: list[tuple[str, str, int, str]]) -> list[Record]:
    return [
        record(number, adapter=adapter, key=key, generated_tokens=tokens, outcome=outcome)
        for number, (adapter, key, tokens, outcome) in enumerate(given_records, 1)
    ]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    parts=st.lists(RECORDS, min_size=1, max_size=30),
    calls=st.lists(st.tuples(st.integers(1, 8), st.integers(0, 30)), max_size=12),
)
async def test_each_record_counts_once_however_often_it_is_sent(
    redis: Redis, parts: list[tuple[str, str, int, str]], calls: list[tuple[int, int]]
) -> None:
    """A sender that forgets where it was goes back as far as it likes, never forward beyond what it sent."""
    await redis.flushdb()
    records, counts, sent = made(parts), Counts(redis), 0
    for length, back in calls:
        start = max(0, sent - back)
        batch = records[start : start + length]
        if batch:
            await counts.add("j", batch, DAY)
        sent = max(sent, start + length)
    await counts.add("j", records, DAY)
    assert await sums_of(redis) == summed(records)


async def test_journals_count_beside_each_other(redis: Redis) -> None:
    counts = Counts(redis)
    for journal in ("a", "b"):
        await counts.add(journal, [record(1)], DAY)
    assert await sums_of(redis) == {Group("poet@1", "key_1"): record(1).amounts.plus(record(1).amounts)}
    assert await counts.tenants(DAY) == ["t"]


async def test_a_record_says_how_it_ended(redis: Redis) -> None:
    outcomes = ("completed", CANCELLED, CUT, "engine_lost")
    await Counts(redis).add("j", [record(n, outcome=o) for n, o in enumerate(outcomes, 1)], DAY)
    [amounts] = (await sums_of(redis)).values()
    assert (amounts.requests, amounts.failed_requests, amounts.cancelled_requests) == (4, 1, 2)
    assert (amounts.prompt_tokens, amounts.generated_tokens, amounts.request_ms) == (12, 10, 1000)


async def test_loads_are_no_requests(redis: Redis) -> None:
    loads = [record(n, kind="load", key="", bytes=10, outcome=o) for n, o in ((1, "completed"), (2, "x"))]
    await Counts(redis).add("j", loads, DAY)
    [amounts] = (await sums_of(redis)).values()
    assert amounts == Amounts(loads=1, failed_loads=1, load_bytes=10, load_ms=250)


async def test_a_days_groups_are_bounded_and_nothing_is_left_out(
    redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = counts_lua.COUNT.replace(str(counts_lua.MAX_GROUPS), "3")
    counts = Counts(redis)
    monkeypatch.setattr(counts, "_count", redis.register_script(script))
    records = [record(n, adapter=f"a{n}@1") for n in range(1, 11)]
    await counts.add("j", records, DAY)
    sums = await sums_of(redis)
    assert len(sums) == 4
    assert sums[Group("other", "other")].requests == 7
    assert sum(amounts.generated_tokens for amounts in sums.values()) == 55


async def test_old_days_and_what_is_known_of_old_journals_are_deleted(redis: Redis) -> None:
    counts = Counts(redis)
    await counts.add("old", [record(1, at=(DAY - 10) * 86_400.0)], DAY - 10)
    await counts.add("new", [record(1)], DAY)
    await counts.delete_before(DAY - 5)
    assert await counts.tenants(DAY - 10) == []
    assert await sums_of(redis, day=DAY - 10) == {}
    assert len(await sums_of(redis)) == 1
    assert [*await redis.hgetall(JOURNALS)] == [b"new"]
    assert len(await redis.keys("*")) == 4  # nothing of that day


async def test_sums_of_a_version_that_knew_fewer_amounts_go_on(redis: Redis) -> None:
    await redis.hset(f"pp:usage:{DAY}:t", "poet@1 key_1", "5 0 0 7")
    await Counts(redis).add("j", [record(1)], DAY)
    [amounts] = (await sums_of(redis)).values()
    assert (amounts.requests, amounts.prompt_tokens, amounts.generated_tokens) == (6, 10, 1)
