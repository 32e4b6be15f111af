"""The sums of the ledger in Valkey: records are added, days are read and deleted. See counts_lua.py."""

from collections.abc import Mapping, Sequence
from typing import Any

from redis.asyncio import Redis

from adapters_store.valkey import store_errors, text
from server.usage.counts_lua import COUNT, DAYS, JOURNALS, PREFIX
from server.usage.record import Amounts, Group, Record

Sums = dict[Group, Amounts]


class Counts:
    """All calls raise StoreError when Valkey does not answer."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._count = redis.register_script(COUNT)

    async def add(self, journal: str, records: Sequence[Record], today: int) -> None:
        """Add those of a journal's records, in their order, that were not added before."""
        while records:
            numbers = (records[0].number, records[-1].number)
            with store_errors():
                added = await self._count(args=[journal, *numbers, today, *_arguments(records)])
            records = [record for record in records if record.number > int(added)] if added else []

    async def forget(self, journal: str) -> None:
        """Drop what is kept for a journal whose file is gone."""
        with store_errors():
            await self._redis.hdel(JOURNALS, journal)

    async def tenants(self, day: int) -> list[str]:
        """Those that have sums of that day, sorted."""
        with store_errors():
            return sorted(map(text, await self._redis.smembers(f"{PREFIX}{day}")))

    async def read(self, day: int, tenants: Sequence[str]) -> list[Sums]:
        """The sums of a day, tenant by tenant."""
        with store_errors():
            async with self._redis.pipeline(transaction=False) as pipeline:
                for tenant in tenants:
                    pipeline.hgetall(f"{PREFIX}{day}:{tenant}")
                return [_sums(found) for found in await pipeline.execute()]

    async def delete_before(self, day: int) -> None:
        """Delete all earlier days, and what is kept for journals that were last heard of then."""
        with store_errors():
            for old in (old for old in map(int, await self._redis.smembers(DAYS)) if old < day):
                keys = [f"{PREFIX}{old}:{tenant}" for tenant in await self.tenants(old)]
                async with self._redis.pipeline(transaction=True) as pipeline:
                    pipeline.unlink(f"{PREFIX}{old}", *keys)
                    pipeline.srem(DAYS, str(old))
                    await pipeline.execute()
            journals: Any = await self._redis.hgetall(JOURNALS)
            if gone := [name for name, value in journals.items() if int(value.split()[1]) < day]:
                await self._redis.hdel(JOURNALS, *gone)


def _arguments(records: Sequence[Record]) -> list[str]:
    """For COUNT: the amounts of these records by day, tenant and group."""
    groups: dict[tuple[int, str, Group], Amounts] = {}
    for record in records:
        where = (record.day, record.tenant, record.group)
        groups[where] = groups.get(where, Amounts()).plus(record.amounts)
    return [
        word
        for (day, tenant, group), amounts in groups.items()
        for word in (str(day), tenant, group.field, " ".join(map(str, amounts)))
    ]


def _sums(found: Mapping[bytes, bytes]) -> Sums:
    return {
        Group(*field.decode().split(" ")): Amounts(*map(int, numbers.split()[: len(Amounts._fields)]))
        for field, numbers in found.items()
    }
