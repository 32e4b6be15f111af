"""What may be asked of the ledger: a sentence for everything else."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.errors import InvalidField
from server.usage.query import MAX_RANGE_DAYS, Cursor, Query, iso, parse_day, parse_query

TODAY = 20_787  # 2026-11-30


def parsed(**given_fields: Any) -> Query:
    defaults: dict[str, Any] = {"start": None, "end": None, "group_by": [], "limit": 7, "page": None}
    return parse_query(today=TODAY, **defaults | given_fields)


def test_by_default_it_is_the_last_week() -> None:
    query = parsed()
    assert [iso(day) for day in (query.start, query.end - 1)] == ["2026-11-24", "2026-11-30"]


def test_seconds_count_as_whole_days() -> None:
    query = parsed(start=str(TODAY * 86_400 - 1), end=str(TODAY * 86_400 + 1))
    assert (query.start, query.end) == (TODAY - 1, TODAY + 1)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"start": "yesterday"}, "start must be YYYY-MM-DD or Unix seconds, not 'yesterday'"),
        ({"start": "2026-02-30"}, "start must be"),
        ({"start": "-5"}, "start must be"),
        ({"start": "1e9"}, "start must be"),
        ({"start": "٣٣٣"}, "start must be"),
        ({"end": "9" * 400}, "end must be"),
        ({"end": "999999999999"}, "end must be"),
        ({"start": "2026-11-02", "end": "2026-11-02"}, "must be after start"),
        ({"start": "2026-11-02", "end": "2026-11-01"}, "must be after start"),
        ({"start": "0", "end": str(86_400 * 1_000_000)}, f"{MAX_RANGE_DAYS} days apart, not 1000000"),
        ({"limit": 0}, "limit must be 1 to 31 days, not 0"),
        ({"limit": 32}, "limit must be"),
        ({"group_by": ["model", "user_id"]}, "group_by must be among adapter, model, key, api_key_id, not"),
        ({"group_by": ["tenant"]}, "group_by must be among"),
        ({"page": "2020-01-01"}, "no next_page"),
        ({"page": "x"}, "no next_page"),
        ({"page": "2026-11-25." + "t" * 400}, "no next_page"),
        ({"adapter": "a" * 400}, "adapter has over"),
    ],
)
def test_anything_else_gets_a_sentence(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidField, match=says):
        parsed(**fields)


@given(st.text(max_size=20))
def test_no_text_is_more_than_refused(text: str) -> None:
    try:
        day = parse_day(text, "start")
    except InvalidField:
        return
    assert parse_day(iso(day), "start") == day


@given(st.integers(TODAY - 6, TODAY), st.sampled_from(["", "ten_1"]))
def test_a_page_comes_back_as_it_was_given(day: int, tenant: str) -> None:
    assert parsed(page=str(Cursor(day, tenant))).cursor == Cursor(day, tenant)


def test_what_all_tenants_used_is_grouped_by_tenant_if_by_anything() -> None:
    assert parsed(with_tenants=True).group_by == frozenset()
    assert parsed(with_tenants=True, group_by=["model"]).group_by == {"adapter", "tenant"}
