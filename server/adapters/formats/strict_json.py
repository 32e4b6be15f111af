"""A strict reader of uploaded JSON: UTF-8, no duplicate keys, no NaN, bounded depth.

A byte order mark, which editors on Windows write, is skipped.
"""

import json
from typing import Any

from server.errors import InvalidAdapter, TooLarge, shown

MAX_DEPTH = 32  # of nested lists and objects; configs of the libraries have 3


def strict_json(data: bytes, what: str, max_bytes: int) -> dict[str, Any]:
    """The JSON object in `data`; `what` names it in error messages. Raises InvalidAdapter, TooLarge."""
    if len(data) > max_bytes:
        raise TooLarge(f"{what} has {len(data)} bytes, more than {max_bytes}.", param="files")
    try:
        value = json.loads(data.decode("utf-8-sig"), object_pairs_hook=_unique, parse_constant=_no_constant)
        if b"\\u" in data:  # an escape can be half of a surrogate pair, which no message could encode
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeError as error:
        raise InvalidAdapter(f"{what} is not UTF-8.", param="files") from error
    except _RefusedError as error:
        raise InvalidAdapter(f"{what} {error}.", param="files") from error
    except RecursionError as error:
        raise InvalidAdapter(f"{what} is nested too deeply.", param="files") from error
    except ValueError as error:
        raise InvalidAdapter(f"{what} is not valid JSON.", param="files") from error
    if not isinstance(value, dict):
        raise InvalidAdapter(f"{what} must hold a JSON object.", param="files")
    if _is_deep(value):
        raise InvalidAdapter(f"{what} is nested too deeply.", param="files")
    return value


def _is_deep(value: Any) -> bool:
    """Whether lists and objects are nested deeper than MAX_DEPTH."""
    level = [value]
    for _ in range(MAX_DEPTH):
        objects = [list(item.values()) for item in level if isinstance(item, dict)]
        lists = [item for item in level if isinstance(item, list)]
        level = [child for children in objects + lists for child in children]
    return any(isinstance(item, dict | list) for item in level)


class _RefusedError(ValueError):
    """Input that the parser itself would accept; the message completes "WHAT ..."."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) == len(pairs):
        return value
    seen: set[str] = set()
    for key, _ in pairs:
        if key in seen:
            raise _RefusedError(f"holds the key {shown(key)} twice")
        seen.add(key)
    return value


def _no_constant(constant: str) -> None:
    raise _RefusedError(f"holds {constant}, which JSON does not have")
