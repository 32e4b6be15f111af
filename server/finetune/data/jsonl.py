"""A strict JSONL reader in bounded memory: each line is one JSON object.

Lines end in LF or CRLF; blank lines are skipped but counted, and so is a byte order mark at the start.
Refused are invalid UTF-8, duplicate keys, NaN and Infinity, and unpaired surrogates.
"""

import json
from codecs import BOM_UTF8
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from server.errors import shown


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
        value = json.loads(raw.decode(), object_pairs_hook=_without_duplicates, parse_constant=_no_constant)
        if rb"\ud" in raw.lower():  # an escaped surrogate must be part of a pair
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeDecodeError as error:
        raise LineError("", f"The line is not UTF-8 at byte {error.start}.") from None
    except UnicodeEncodeError:
        raise LineError("", "The line holds half a surrogate pair.") from None
    except json.JSONDecodeError as error:
        raise LineError("", f"The line is not JSON: {error.msg} at character {error.pos}.") from None
    except RecursionError:
        raise LineError("", "The line is nested too deeply.") from None
    except ValueError:  # an integer of more digits than Python converts
        raise LineError("", "The line holds a number with too many digits.") from None
    if not isinstance(value, dict):
        raise LineError("", f"The line must be one JSON object, not {described(value)}.")
    return value


def described(value: object) -> str:
    """A value in a few words, without the content of lists and objects: their repr may exhaust the stack."""
    return "a list" if isinstance(value, list) else "an object" if isinstance(value, dict) else shown(value)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        seen: set[str] = set()
        duplicate = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise LineError("", f"The line has the key {shown(duplicate)} twice.")
    return result


def _no_constant(constant: str) -> None:
    raise LineError("", f"The line holds {constant}, which JSON does not have.")
