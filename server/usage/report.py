"""A page of the ledger: the sums of some days, by what the query groups them. Knows no HTTP."""

from collections.abc import AsyncIterator
from typing import NamedTuple

from server.usage.counts import Counts, Sums
from server.usage.query import Cursor, Query
from server.usage.record import Amounts, Group

TENANTS_AT_ONCE = 100  # in one call of Valkey
MAX_ROWS = 20_000  # of a page, and those of one tenant more: the page ends early


Where = tuple[str | None, str | None, str | None]  # the first three of a Row


class Row(NamedTuple):
    """None: not grouped by it."""

    tenant: str | None
    adapter: str | None
    key: str | None
    amounts: Amounts


class Page(NamedTuple):
    days: dict[int, list[Row]]  # each day of the page, also one without rows
    next: Cursor | None


async def read_page(counts: Counts, query: Query, tenant: str | None) -> Page:
    """From the query's cursor on; `tenant`: of this one alone. Raises StoreError."""
    sums: dict[int, dict[Where, Amounts]] = {}
    rows = 0
    end = min(query.end, query.cursor.day + query.limit)
    for day in range(query.cursor.day, end):
        of_day = sums.setdefault(day, {})
        after = query.cursor.tenant if day == query.cursor.day else ""
        async for name, found in _tenants(counts, day, tenant, after):
            if rows + len(of_day) >= MAX_ROWS:
                return Page(_rows(sums), Cursor(day, name))
            _add(of_day, query, name, found)
        rows += len(of_day)
    return Page(_rows(sums), Cursor(end) if end < query.end else None)


async def _tenants(
    counts: Counts, day: int, tenant: str | None, after: str
) -> AsyncIterator[tuple[str, Sums]]:
    """The sums of each tenant of a day, in the order of their ids, from `after` on."""
    names = [tenant] if tenant is not None else [name for name in await counts.tenants(day) if name >= after]
    for start in range(0, len(names), TENANTS_AT_ONCE):
        some = names[start : start + TENANTS_AT_ONCE]
        for name, sums in zip(some, await counts.read(day, some), strict=True):
            yield name, sums


def _add(of_day: dict[Where, Amounts], query: Query, tenant: str, sums: Sums) -> None:
    for group, amounts in sums.items():
        if _wanted(query, group):
            row = (
                tenant if "tenant" in query.group_by else None,
                group.adapter if "adapter" in query.group_by else None,
                group.key if "key" in query.group_by else None,
            )
            of_day[row] = of_day[row].plus(amounts) if row in of_day else amounts


def _wanted(query: Query, group: Group) -> bool:
    return query.adapter in (None, group.adapter) and query.key in (None, group.key)


def _rows(sums: dict[int, dict[Where, Amounts]]) -> dict[int, list[Row]]:
    return {
        day: [Row(*row, of_day[row]) for row in sorted(of_day, key=lambda row: [part or "" for part in row])]
        for day, of_day in sums.items()
    }
