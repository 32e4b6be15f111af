import asyncio

import pytest

from server.api.services import FairLock
from server.errors import DeadlineExceeded

pytestmark = pytest.mark.anyio


async def test_one_at_a_time_and_no_tenants_second_before_anothers_first() -> None:
    lock, order = FairLock(), list[str]()
    running = 0

    async def work(tenant: str) -> None:
        nonlocal running
        async with lock.acquire(tenant, 10):
            running += 1
            assert running == 1
            await asyncio.sleep(0)
            order.append(tenant)
            running -= 1

    await asyncio.gather(*(work(tenant) for tenant in "aaaabbc"))
    assert order[0] == "a"
    assert sorted(order[1:4]) in (["a", "b", "c"], ["b", "b", "c"])
    assert order.index("b") < 3
    assert order.index("c") < 3
    assert not lock._tenant_locks, "nothing is remembered of those who are done"


async def test_whoever_waits_too_long_is_told() -> None:
    lock = FairLock()
    async with lock.acquire("a", 10):
        for tenant in ("a", "b"):
            with pytest.raises(DeadlineExceeded):
                async with lock.acquire(tenant, 0.01):
                    pytest.fail("it was not its turn")
