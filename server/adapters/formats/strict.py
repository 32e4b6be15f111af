"""JSON from tenants, read strictly: UTF-8, no duplicate keys, no NaN, no depth that could exhaust a stack."""

import json
from typing import Any

from server.errors import InvalidAdapter, TooLarge, shown

MAX_TEXT = 1024


def strict_json(data: bytes, what: str, max_bytes: int) -> dict[str, Any]:
    """The JSON object in `data`. `what` names it in messages: "adapter_config.json"."""
    if len(data) > max_bytes:
        raise TooLarge(f"{what} has {len(data)} bytes, more than {max_bytes}.", param="files")
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant)
        if b"\\u" in data:  # an escape can name half a character, which no message could carry
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
    return value


def check_inert(what: str, field: str, value: Any) -> None:
    """A field that is dropped all the same; but a URL or a heap of data was put there for a reason."""
    flat = list(value.values()) if isinstance(value, dict) else value
    for item in flat if isinstance(flat, list) else [flat]:
        if isinstance(item, dict | list):
            raise InvalidAdapter(f"{what} has {field} {shown(value)}; it must be a plain value.", param=field)
        if isinstance(item, str) and (len(item) > MAX_TEXT or "://" in item):
            rule = f"it must be text of at most {MAX_TEXT} characters and no URL"
            raise InvalidAdapter(f"{what} has {field} {shown(item)}; {rule}.", param=field)


class _RefusedError(ValueError):
    """Says in a few words what the parser itself would have let through."""


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
