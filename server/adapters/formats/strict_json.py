"""Uploaded JSON, read strictly (see json_reader.py) and of bounded depth, as sentences about a file.

A byte order mark, which editors on Windows write, is skipped.
"""

from codecs import BOM_UTF8
from typing import Any

from server.errors import InvalidAdapter, TooLarge, shown
from server.json_reader import (
    DuplicateKeyError,
    JsonEncodingError,
    JsonError,
    JsonSyntaxError,
    is_deeper,
    read_json,
)

MAX_DEPTH = 32  # of nested lists and objects; configs of the libraries have 3


def strict_json(data: bytes, what: str, max_bytes: int) -> dict[str, Any]:
    """The JSON object in `data`; `what` names it in error messages. Raises InvalidAdapter, TooLarge."""
    if len(data) > max_bytes:
        raise TooLarge(f"{what} has {len(data)} bytes, more than {max_bytes}.", param="files")
    try:
        value = read_json(data.removeprefix(BOM_UTF8))
    except JsonError as error:
        raise InvalidAdapter(f"{what} {_reason(error)}.", param="files") from error
    if not isinstance(value, dict):
        raise InvalidAdapter(f"{what} must hold a JSON object.", param="files")
    if is_deeper(value, MAX_DEPTH):
        raise InvalidAdapter(f"{what} is nested too deeply.", param="files")
    return value


def _reason(error: JsonError) -> str:
    """Why the file is refused, without a byte or a character, which a reader of tensors could not look up."""
    if isinstance(error, JsonEncodingError):
        return "is not UTF-8"
    if isinstance(error, JsonSyntaxError):
        return "is not valid JSON"
    if isinstance(error, DuplicateKeyError):
        return f"holds the key {shown(error.key)} twice"
    return error.reason
