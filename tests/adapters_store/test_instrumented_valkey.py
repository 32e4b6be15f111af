"""Calls of Valkey are told: how long, and whether they failed. And how much there is in it."""

import pytest
from redis.asyncio import Redis
from redis.exceptions import ConnectionError, ResponseError  # noqa: A004 - redis names it so

from adapters_store.maintenance.counts import StoreCounts, store_counts
from adapters_store.valkey import connect
from server.tenancy.tenant_keys import TENANTS
from server.tenancy.tenants import OPERATOR, Tenants

pytestmark = pytest.mark.anyio


async def test_commands_scripts_and_pipelines_are_one_call_each(valkey_url: str) -> None:
    client = connect(valkey_url)
    told: list[tuple[float, bool]] = []
    client.on_call = lambda seconds, failed: told.append((seconds, failed))
    await client.set("a", 1)
    await client.eval("return 1", 0)
    async with client.pipeline(transaction=True) as pipeline:
        pipeline.get("a")
        pipeline.get("b")
        assert await pipeline.execute() == [b"1", None]
    assert len(told) == 3
    with pytest.raises(ResponseError):
        await client.lpush("a", 1)
    assert [failed for _, failed in told] == [False] * 4
    assert all(0 < seconds < 5 for seconds, _ in told)
    await client.aclose()


async def test_a_call_nobody_answers_failed() -> None:
    client = connect("redis://127.0.0.1:1/0")
    told: list[bool] = []
    client.on_call = lambda _seconds, failed: told.append(failed)
    with pytest.raises(ConnectionError):
        await client.get("a")
    async with client.pipeline() as pipeline:
        pipeline.get("a")
        with pytest.raises(ConnectionError):
            await pipeline.execute()
    assert told == [True, True]
    await client.aclose()


async def test_the_census_counts_everybodys_adapters(redis: Redis) -> None:
    assert await store_counts(redis, TENANTS, OPERATOR.id) == StoreCounts(0, 0)
    tenants = Tenants(redis)
    for number in range(3):
        tenant, _ = await tenants.create(f"t{number}")
        await redis.zadd(f"pp:adapters:{tenant.id}", {f"a{i}": 0 for i in range(number + 1)})
    await redis.zadd("pp:adapters:operator", {"loaded": 0})
    assert await store_counts(redis, TENANTS, OPERATOR.id) == StoreCounts(3, 7)
