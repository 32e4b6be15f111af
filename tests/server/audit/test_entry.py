"""Names, details and positions of entries, over drawn text."""

from typing import Any

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from server.audit.entry import MAX_DETAILS_BYTES, MAX_TARGET_CHARS, Position, bounded, named, parse_position

NUMBERS = st.integers(0, 10**15 - 1)


@given(st.lists(st.text(), max_size=4))
def test_a_name_is_printable_and_bounded(parts: list[str]) -> None:
    name = named(*parts)
    assert name.isprintable()
    assert len(name) <= MAX_TARGET_CHARS
    whole = "/".join(parts)
    if whole.isprintable() and len(whole) <= MAX_TARGET_CHARS:
        assert name == whole


@given(st.dictionaries(st.text(max_size=30), st.one_of(st.text(), st.integers(), st.none()), max_size=30))
def test_details_are_bounded(details: dict[str, Any]) -> None:
    kept = bounded(details)
    assert len(msgspec.json.encode(kept)) <= 2 * MAX_DETAILS_BYTES
    assert kept == details or kept.keys() == {"fields"}


@given(NUMBERS, NUMBERS, st.text(min_size=1))
def test_a_position_is_read_as_it_is_written(milliseconds: int, sequence: int, tenant: str) -> None:
    position = Position(milliseconds, sequence, tenant)
    assert parse_position(str(position)) == position


@given(st.text())
def test_other_text_is_no_position(text: str) -> None:
    position = parse_position(text)
    assert position is None or position.milliseconds >= 0
