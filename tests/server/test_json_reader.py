"""What the JSON of bodies, data files and uploaded adapters has in common; each has words of its own."""

from typing import Any

import pytest

from server.json_reader import (
    DuplicateKeyError,
    JsonEncodingError,
    JsonError,
    JsonSyntaxError,
    is_deeper,
    read_json,
)


@pytest.mark.parametrize(
    ("data", "kind", "reason"),
    [
        (b'"\xff"', JsonEncodingError, "is not UTF-8 at byte 1"),
        (rb'"\uD83d"', JsonEncodingError, "holds half a surrogate pair"),
        (rb'{"\ude42": 1}', JsonEncodingError, "holds half a surrogate pair"),
        (b"", JsonSyntaxError, "is not JSON: Expecting value at character 0"),
        (b"\xef\xbb\xbf1", JsonSyntaxError, "is not JSON: Unexpected UTF-8 BOM"),
        (b"1" * 5000, JsonSyntaxError, "holds a number with too many digits"),
        (b'[{"a": 1, "b": 2, "b": 3, "a": 4}]', DuplicateKeyError, "has the key 'b' twice"),
        (b"[" * 100_000, JsonError, "is nested too deeply"),
        (b"[-Infinity]", JsonError, "holds -Infinity, which JSON does not have"),
    ],
)
def test_a_fault_has_a_kind_and_a_reason(data: bytes, kind: type[JsonError], reason: str) -> None:
    with pytest.raises(JsonError) as refused:
        read_json(data)
    assert type(refused.value) is kind
    assert refused.value.reason.startswith(reason)


def test_a_whole_surrogate_pair_and_an_escaped_backslash_are_text() -> None:
    assert read_json(rb'["\uD83D\uDE42", "\\ud83d"]') == ["🙂", r"\ud83d"]


def test_what_json_does_not_have_is_read_if_the_caller_refuses_it() -> None:
    assert read_json(b"[Infinity, -Infinity]", allow_nan=True) == [float("inf"), float("-inf")]


@pytest.mark.parametrize(("value", "depth"), [({}, 1), ([1], 1), ({"a": [1, {}]}, 3), ([[], [[[2]]]], 4)])
def test_depth_counts_lists_and_objects(value: Any, depth: int) -> None:
    assert not is_deeper(value, depth)
    assert depth == 1 or is_deeper(value, depth - 1)
