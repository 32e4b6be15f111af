"""JSONL as it is found in the wild: line ends, byte order marks, and all that is no JSON object."""

import json
from pathlib import Path

import pytest

from server.finetune.data.jsonl import LineError, parse_line, read_lines


def lines_of(tmp_path: Path, data: bytes, line_bytes: int = 16) -> list[tuple[int, bytes | None]]:
    path = tmp_path / "data.jsonl"
    path.write_bytes(data)
    return list(read_lines(path, line_bytes))


def test_lines_are_numbered_and_keep_their_ends(tmp_path: Path) -> None:
    assert lines_of(tmp_path, b"{}\r\n\n{}") == [(1, b"{}\r\n"), (2, b"\n"), (3, b"{}")]


def test_a_byte_order_mark_counts_at_the_start_only(tmp_path: Path) -> None:
    assert lines_of(tmp_path, b"\xef\xbb\xbf{}\n\xef\xbb\xbf{}") == [(1, b"{}\n"), (2, b"\xef\xbb\xbf{}")]
    with pytest.raises(LineError, match="not JSON"):
        parse_line(b"\xef\xbb\xbf{}")


@pytest.mark.parametrize("end", [b"", b"\n", b"\nnext"])
def test_a_line_over_the_limit_is_skipped_and_the_next_one_read(tmp_path: Path, end: bytes) -> None:
    rest: list[tuple[int, bytes | None]] = [(3, b"next")] if end == b"\nnext" else []
    assert lines_of(tmp_path, b"a\n" + b"x" * 17 + end) == [(1, b"a\n"), (2, None), *rest]
    assert lines_of(tmp_path, b"a\n" + b"x" * 1000 + end) == [(1, b"a\n"), (2, None), *rest]
    assert lines_of(tmp_path, b"a\n" + b"x" * 16 + end)[1] == (2, b"x" * 16 + end[:1])


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b"", "not JSON: Expecting value at character 0"),
        (b'{"text": "a"} {"text": "b"}', "not JSON: Extra data at character 14"),
        (b"{'text': 'a'}", "not JSON"),
        (b'{"text": "a",}', "not JSON"),
        (b'{"text": "a\tb"}', "not JSON: Invalid control character"),
        (b'{"text": "\xff"}', "not UTF-8 at byte 10"),
        (b'\xff\xfe{\x00"\x00', "not UTF-8 at byte 0"),
        (b'{"text": "\xed\xa0\xbd"}', "not UTF-8 at byte 10"),
        (rb'{"text": "\ud83d"}', "half a surrogate pair"),
        (rb'{"\uDE00": 1}', "half a surrogate pair"),
        (b'{"text": NaN}', "holds NaN"),
        (b'{"text": [-Infinity]}', "holds -Infinity"),
        (b'{"text": "a", "text": "b"}', "the key 'text' twice"),
        (b'{"messages": [{"role": 1, "role": 2}]}', "the key 'role' twice"),
        (b'{"text": ' + b"1" * 5000 + b"}", "too many digits"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a":' * 50_000, "nested too deeply"),
        (b"[[]]", "must be one JSON object, not a list"),
        (b'"text"', "not 'text'"),
        (b"null", "not None"),
    ],
)
def test_what_is_no_json_object_is_refused_in_a_sentence(raw: bytes, reason: str) -> None:
    with pytest.raises(LineError) as refused:
        parse_line(raw)
    assert reason in refused.value.reason
    assert refused.value.field == ""


def test_a_last_key_given_twice_is_found_in_one_pass() -> None:
    keys = ", ".join(f'"{n}": 0' for n in range(100_000))
    with pytest.raises(LineError, match="'0' twice"):
        parse_line(f'{{{keys}, "0": 1}}'.encode())


def test_a_whole_surrogate_pair_is_a_character() -> None:
    assert parse_line(rb'{"text": "\ud83d\ude42"}') == {"text": "🙂"}


@pytest.mark.parametrize("depth", range(900, 1010))
def test_nesting_near_the_stacks_end_is_a_fault_or_a_value(depth: int) -> None:
    raw = json.dumps({"text": "\ud83d\ude42"}).encode()[:-1] + b', "x": ' + b"[" * depth + b"]" * depth + b"}"
    try:
        value = parse_line(raw)
    except LineError as fault:
        value = {"text": fault.reason}
    assert value["text"] in {"🙂", "The line is nested too deeply."}
