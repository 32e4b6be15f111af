"""The strict JSON reader: UTF-8, no key twice, no half surrogate pair; no NaN unless the caller refuses it.

Knows no sender: each caller makes a sentence of the error's reason, "The body is not JSON: ...".
"""

import json
from typing import Any

from server.errors import shown


class JsonError(Exception):
    """`reason` completes a sentence: "The body REASON."."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class JsonEncodingError(JsonError):
    """Bytes that are no text: not UTF-8, or half a surrogate pair, which no message could encode."""


class JsonSyntaxError(JsonError):
    """Text that is no JSON, or a number of more digits than Python converts."""


class DuplicateKeyError(JsonError):
    def __init__(self, key: str) -> None:
        super().__init__(f"has the key {shown(key)} twice")
        self.key = key


def read_json(data: bytes, *, allow_nan: bool = False) -> Any:
    """The value in `data`. `allow_nan`: NaN and Infinity are read as floats. Raises JsonError."""
    constant = float if allow_nan else _refuse_constant
    try:
        value = json.loads(data.decode(), object_pairs_hook=_object, parse_constant=constant)
        if rb"\ud" in data or rb"\uD" in data:  # escaped surrogates: encoding fails unless they come in pairs
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeDecodeError as error:
        raise JsonEncodingError(f"is not UTF-8 at byte {error.start}") from None
    except UnicodeEncodeError:
        raise JsonEncodingError("holds half a surrogate pair") from None
    except json.JSONDecodeError as error:
        raise JsonSyntaxError(f"is not JSON: {error.msg} at character {error.pos}") from None
    except RecursionError:
        raise JsonError("is nested too deeply") from None
    except ValueError:  # an integer of more digits than Python converts
        raise JsonSyntaxError("holds a number with too many digits") from None
    return value


def is_deeper(value: Any, levels: int) -> bool:
    """Whether lists and objects are nested deeper than `levels`: a recursive walk may overflow the stack."""
    level = [value]
    for _ in range(levels):
        level = [
            item
            for outer in level
            for item in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(item, dict | list)
        ]
        if not level:
            return False
    return True


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of these fields. Raises DuplicateKeyError."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        seen: set[str] = set()
        raise DuplicateKeyError(next(key for key, _ in pairs if key in seen or seen.add(key)))  # type: ignore[func-returns-value]
    return fields


def _refuse_constant(constant: str) -> None:
    raise JsonError(f"holds {constant}, which JSON does not have")
