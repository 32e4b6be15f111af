"""What is asked of the ledger: days, groups, filters and a place in the answer. Parsed strictly; no I/O."""

from collections.abc import Sequence
from datetime import UTC, date, datetime
from typing import Literal, NamedTuple

from server.errors import InvalidField, shown
from server.usage.record import SECONDS_A_DAY

EPOCH = date(1970, 1, 1)
DEFAULT_DAYS, MAX_DAYS = 7, 31  # of a page
MAX_RANGE_DAYS = 4000
MAX_TEXT = 300  # characters of a filter
Dimension = Literal["tenant", "adapter", "key"]
# OpenAI's names beside ours
DIMENSIONS: dict[str, Dimension] = {
    "tenant": "tenant",
    "project_id": "tenant",
    "adapter": "adapter",
    "model": "adapter",
    "key": "key",
    "api_key_id": "key",
}


class Cursor(NamedTuple):
    """The first sums that a page has not: those of a day, from a tenant on."""

    day: int
    tenant: str = ""

    def __str__(self) -> str:
        return f"{iso(self.day)}.{self.tenant}" if self.tenant else iso(self.day)


class Query(NamedTuple):
    start: int  # the first day, in days since 1970-01-01 (UTC)
    end: int  # the day after the last
    group_by: frozenset[Dimension]
    limit: int  # days of a page
    cursor: Cursor
    adapter: str | None = None  # these alone, if given
    key: str | None = None


def parse_query(
    *,
    today: int,
    start: str | None,
    end: str | None,
    group_by: Sequence[str],
    limit: int,
    page: str | None,
    adapter: str | None = None,
    key: str | None = None,
    with_tenants: bool = False,
) -> Query:
    """By default the last DEFAULT_DAYS days, today included. Raises InvalidField."""
    last = today + 1 if end is None else parse_day(end, "end", up=True)
    first = last - DEFAULT_DAYS if start is None else parse_day(start, "start")
    if last <= first:
        raise InvalidField(f"end ({iso(last)}) must be after start ({iso(first)}).", param="end")
    if last - first > MAX_RANGE_DAYS:
        raise InvalidField(
            f"start and end may be {MAX_RANGE_DAYS} days apart, not {last - first}.", param="start"
        )
    if not 1 <= limit <= MAX_DAYS:
        raise InvalidField(f"limit must be 1 to {MAX_DAYS} days, not {shown(limit)}.", param="limit")
    dimensions = frozenset(_dimension(name, with_tenants) for name in group_by)
    if with_tenants and dimensions:  # names of adapters are a tenant's
        dimensions |= {"tenant"}
    cursor = Cursor(first) if page is None else _parse_page(page, first, last)
    for param, text in (("adapter", adapter), ("key", key)):
        if text is not None and len(text) > MAX_TEXT:
            raise InvalidField(f"{param} has over {MAX_TEXT} characters.", param=param)
    return Query(first, last, dimensions, limit, cursor, adapter, key)


def parse_day(text: str, param: str, *, up: bool = False) -> int:
    """A day of the form YYYY-MM-DD, or Unix seconds, which count as their day; with `up`, as the day's end.

    Raises InvalidField.
    """
    if text.isascii() and text.isdigit() and len(text) <= 12:
        day = (int(text) + (SECONDS_A_DAY - 1) * up) // SECONDS_A_DAY
        if day < _day(date.max):
            return day
    try:
        if len(text) == len("YYYY-MM-DD"):
            return _day(date.fromisoformat(text))
    except ValueError:
        pass
    raise InvalidField(f"{param} must be YYYY-MM-DD or Unix seconds, not {shown(text)}.", param=param)


def iso(day: int) -> str:
    """YYYY-MM-DD."""
    return datetime.fromtimestamp(day * SECONDS_A_DAY, UTC).date().isoformat()


def _day(of: date) -> int:
    return (of - EPOCH).days


def _dimension(name: str, with_tenants: bool) -> Dimension:
    names = [known for known, dimension in DIMENSIONS.items() if with_tenants or dimension != "tenant"]
    if name not in names:
        raise InvalidField(f"group_by must be among {', '.join(names)}, not {shown(name)}.", param="group_by")
    return DIMENSIONS[name]


def _parse_page(text: str, first: int, last: int) -> Cursor:
    day, _, tenant = text.partition(".")
    try:
        cursor = Cursor(parse_day(day, "page"), tenant)
    except InvalidField:
        cursor = Cursor(-1)
    if not first <= cursor.day < last or len(tenant) > MAX_TEXT:
        raise InvalidField(f"page is {shown(text)}, which is no next_page of this list.", param="page")
    return cursor
