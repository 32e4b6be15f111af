"""Records of usage for tests, and the sums they should make."""

from collections.abc import Iterable
from typing import Any

from redis.asyncio import Redis

from server.usage.counts import Counts
from server.usage.record import COMPLETED, SECONDS_A_DAY, Amounts, Group, Record

DAY = 20_000


def record(number: int, **fields: Any) -> Record:
    defaults: dict[str, Any] = {
        "id": f"r{number}",
        "kind": "request",
        "at": DAY * SECONDS_A_DAY + 5.0,
        "tenant": "t",
        "key": "key_1",
        "adapter": "poet@1",
        "outcome": COMPLETED,
        "prompt_tokens": 3,
        "cached_tokens": 1,
        "generated_tokens": number,
        "seconds": 0.25,
    }
    return Record(number=number, **defaults | fields)


def summed(records: Iterable[Record]) -> dict[Group, Amounts]:
    sums: dict[Group, Amounts] = {}
    for one in records:
        sums[one.group] = sums.get(one.group, Amounts()).plus(one.amounts)
    return sums


async def sums_of(redis: Redis, tenant: str = "t", day: int = DAY) -> dict[Group, Amounts]:
    [sums] = await Counts(redis).read(day, [tenant])
    return sums
