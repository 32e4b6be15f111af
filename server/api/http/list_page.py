"""Pages of a list, in OpenAI's shape. Knows no route."""

from typing import Any

from fastapi import Response

from server.api.http.error_responses import json_response
from server.errors import InvalidField, shown


def check_limit(limit: int, max_limit: int) -> None:
    """Raise InvalidField unless `limit` is the size of a page."""
    if not 1 <= limit <= max_limit:
        raise InvalidField(f"limit must be 1 to {max_limit}, not {shown(limit)}.", param="limit")


def list_page(objects: list[dict[str, Any]], limit: int) -> Response:
    """The first `limit` of `objects`; one more of them, if there is one, makes `has_more` true."""
    page = objects[:limit]
    return json_response(
        {
            "object": "list",
            "data": page,
            "first_id": page[0]["id"] if page else None,
            "last_id": page[-1]["id"] if page else None,
            "has_more": len(objects) > limit,
        }
    )
