"""A page of the ledger of usage as OpenAI's object, or as CSV."""

import csv
import io
from typing import Any

from fastapi import Request, Response

from server.api.http.error_responses import json_response
from server.errors import InvalidField, shown
from server.usage.query import iso
from server.usage.record import SECONDS_A_DAY, Amounts
from server.usage.report import Page, Row

JSON, CSV = "application/json", "text/csv"
FORMATS = {"json": JSON, "csv": CSV}
FORMULA = ("=", "+", "-", "@", "\t", "\r")  # spreadsheets compute a cell that begins so


def check_format(request: Request, given: str | None) -> str:
    """The media type: that of `format`, else CSV if the Accept header asks for it. Raises InvalidField."""
    if given is None:
        accepted = request.headers.get("accept", "").lower()
        return CSV if CSV in accepted and JSON not in accepted else JSON
    if given not in FORMATS:
        raise InvalidField(f"format must be json or csv, not {shown(given)}.", param="format")
    return FORMATS[given]


def usage_response(page: Page, media_type: str, base: str) -> Response:
    """`base`: what the base is called. CSV has the next page in the header x-next-page."""
    following = None if page.next is None else str(page.next)
    if media_type == CSV:
        headers = {"content-disposition": 'attachment; filename="usage.csv"'}
        headers |= {} if following is None else {"x-next-page": following}
        return Response(_csv(page, base), headers=headers, media_type=CSV)
    data = [_bucket(day, rows, base) for day, rows in page.days.items()]
    return json_response(
        {"object": "page", "data": data, "has_more": following is not None, "next_page": following}
    )


def _bucket(day: int, rows: list[Row], base: str) -> dict[str, Any]:
    return {
        "object": "bucket",
        "start_time": day * SECONDS_A_DAY,
        "end_time": (day + 1) * SECONDS_A_DAY,
        "date": iso(day),
        "results": [_result(row, base) for row in rows],
    }


def _result(row: Row, base: str) -> dict[str, Any]:
    """OpenAI's fields, then ours."""
    return {
        "object": "organization.usage.completions.result",
        "input_tokens": row.amounts.prompt_tokens,
        "output_tokens": row.amounts.generated_tokens,
        "input_cached_tokens": row.amounts.cached_tokens,
        "num_model_requests": row.amounts.requests,
        "project_id": row.tenant,
        "user_id": None,
        "api_key_id": row.key,
        "model": base if row.adapter == "" else row.adapter,
        "batch": None,
        "service_tier": None,
        **amounts_object(row.amounts),
    }


def amounts_object(amounts: Amounts) -> dict[str, float]:
    """The amounts by name; times in seconds."""
    return {
        name.replace("_ms", "_seconds"): amount / 1000 if name.endswith("_ms") else amount
        for name, amount in amounts._asdict().items()
    }


def _csv(page: Page, base: str) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["date", "tenant", "adapter", "key", *amounts_object(Amounts())])
    for day, rows in page.days.items():
        for row in rows:
            names = (row.tenant, base if row.adapter == "" else row.adapter, row.key)
            writer.writerow([iso(day), *map(_cell, names), *amounts_object(row.amounts).values()])
    return text.getvalue()


def _cell(name: str | None) -> str:
    """A name as text, whatever it begins with."""
    name = name or ""
    return f"'{name}" if name.startswith(FORMULA) else name
