"""Multipart bodies for the OpenAPI document, which the routes read themselves (see http/multipart.py)."""

from typing import Any

FILE = {"type": "string", "format": "binary"}


def form(
    file: str, texts: dict[str, str] | None = None, *, many: bool = False, required: tuple[str, ...] = ()
) -> dict[str, Any]:
    """A route's `openapi_extra`: a form with `file`, one or `many`; `texts`: fields, and what they are."""
    properties: dict[str, Any] = {file: {"type": "array", "items": FILE} if many else FILE}
    for name, said in (texts or {}).items():
        properties[name] = {"type": "string", "description": said}
    schema = {"type": "object", "required": [file, *required], "properties": properties}
    return {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": schema}}}}
