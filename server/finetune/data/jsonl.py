"""A strict JSONL reader in bounded memory: each line is one JSON object.

Lines end in LF or CRLF; blank lines are skipped but counted, and so is a byte order mark at the start.
"""

from codecs import BOM_UTF8
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from server.errors import shown
from server.json_reader import JsonError, read_json


class LineError(Exception):
    """A line's error: `field` is a path in the line, or "" for the whole line; `reason` is a sentence."""

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(reason)
        self.field = field
        self.reason = reason


def read_lines(path: Path, line_bytes: int) -> Iterator[tuple[int, bytes | None]]:
    """(number from 1, bytes) of each line; None for a line of more than `line_bytes`."""
    with path.open("rb") as file:
        number = 0
        while raw := file.readline(line_bytes + 1):
            number += 1
            complete = len(raw) <= line_bytes or raw.endswith(b"\n")
            yield number, raw.removeprefix(BOM_UTF8 if number == 1 else b"") if complete else None
            while raw and not raw.endswith(b"\n"):
                raw = file.readline(line_bytes)


def parse_line(raw: bytes) -> dict[str, Any]:
    """The line's JSON object. Raises LineError."""
    try:
        value = read_json(raw)
    except JsonError as error:
        raise LineError("", f"The line {error.reason}.") from None
    if not isinstance(value, dict):
        raise LineError("", f"The line must be one JSON object, not {described(value)}.")
    return value


def described(value: object) -> str:
    """A value in a few words, without the content of lists and objects: their repr may exhaust the stack."""
    return "a list" if isinstance(value, list) else "an object" if isinstance(value, dict) else shown(value)
