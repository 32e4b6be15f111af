"""Multipart bodies for the OpenAPI document, which the routes read themselves (see http/multipart.py)."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

NONE: Mapping[str, str] = MappingProxyType({})
FILE = {"type": "string", "format": "binary"}


def form(
    file: str, fields: Mapping[str, str] = NONE, *, many: bool = False, required: tuple[str, ...] = ()
) -> dict[str, Any]:
    """A route's `openapi_extra`: a form with `file`, one or `many`; `fields`: texts, and what they are."""
    texts = {name: {"type": "string", "description": said} for name, said in fields.items()}
    properties = {file: {"type": "array", "items": FILE} if many else FILE} | texts
    schema = {"type": "object", "required": [file, *required], "properties": properties}
    return {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": schema}}}}
