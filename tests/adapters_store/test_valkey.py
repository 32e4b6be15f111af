import asyncio

import pytest
from redis.asyncio import Redis

pytestmark = pytest.mark.anyio


async def test_a_caller_who_is_cancelled_stops_and_leaves_the_pool_whole(redis: Redis) -> None:
    """At whatever point of a command: also as it is sent, where Python 3.11's wait_for would go on."""

    async def ask_for_ever() -> None:
        while True:
            await redis.get("x")

    for turns in range(200):
        task = asyncio.create_task(ask_for_ever())
        for _ in range(turns % 25):
            await asyncio.sleep(0)
        task.cancel()
        done, _ = await asyncio.wait([task], timeout=5)
        assert done, f"it goes on when it is cancelled after {turns % 25} turns of the loop"
        assert task.cancelled()
    assert await asyncio.gather(*(redis.get("x") for _ in range(200))) == [None] * 200
