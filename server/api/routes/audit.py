"""GET /v1/audit: a tenant's audit log, as a page of JSON, or whole as JSON lines or CSV."""

import csv
import io
from collections.abc import AsyncIterator, Sequence
from typing import Annotated, Any, Literal

import msgspec
from fastapi import APIRouter, Depends, Query, Response
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, ConfigDict, Field

from server.api.http.body_model import LAST_SECOND
from server.api.http.dependencies import CurrentTenant, Deps, current_tenant
from server.api.http.list_page import check_limit, list_page
from server.api.services import Services
from server.audit.audit_log import Span
from server.audit.entry import Entry, Recorded, parse_position
from server.audit.newest import newest_first
from server.errors import InvalidField, shown
from server.tenancy.tenants import OPERATOR

router = APIRouter(prefix="/v1", dependencies=[Depends(current_tenant)])

MAX_PAGE = 1000
COLUMNS = (
    *("id", "time", "tenant", "actor", "by", "action", "target", "outcome", "status"),
    *("address", "request_id", "details"),
)
FORMULA = ("=", "+", "-", "@", "\t", "\r")  # what makes a spreadsheet compute a cell


class AuditQuery(BaseModel):
    """Which entries. Times are Unix seconds; `action` may end in a dot: key. are all of keys."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    actor: str | None = None
    action: str | None = None
    target: str | None = None
    outcome: Literal["done", "refused", "failed", "unknown"] | None = None
    since: Annotated[float, Field(ge=0, le=LAST_SECOND)] = 0.0
    until: Annotated[float, Field(ge=0, le=LAST_SECOND)] | None = None
    after: str | None = None  # the id of the last entry of the page before
    limit: int = 100
    format: Literal["json", "jsonl", "csv"] = "json"

    def takes(self, entry: Entry) -> bool:
        action = self.action or ""
        return (
            self.actor in (None, entry.actor)
            and (
                self.action in (None, entry.action)
                or (action[-1:] == "." and entry.action.startswith(action))
            )
            and self.target in (None, entry.target)
            and self.outcome in (None, entry.outcome)
        )


@router.get("/audit")
async def get_audit(deps: Deps, tenant: CurrentTenant, query: Annotated[AuditQuery, Query()]) -> Response:
    """Newest first. What the operator changed is there, too, but not from where and by which key."""
    return await answer(deps, [tenant.id], query, own=tenant is not OPERATOR)


async def answer(deps: Services, tenants: Sequence[str], query: AuditQuery, *, own: bool) -> Response:
    """The entries of `tenants`. `own`: for a tenant's eyes."""
    check_limit(query.limit, MAX_PAGE)
    after = None if query.after is None else parse_position(query.after)
    if query.after is not None and after is None:
        raise InvalidField(f"after must be the id of an entry, not {shown(query.after)}.", param="after")
    entries = newest_first(deps.audit, tenants, Span(query.since, query.until), after)
    found = _objects(entries, query, own=own)
    if query.format == "json":
        page = [item async for item in _first(found, query.limit + 1)]
        return list_page(page, query.limit)
    write, kind = (_csv, "text/csv") if query.format == "csv" else (_jsonl, "application/jsonl")
    headers = {"Content-Disposition": f'attachment; filename="audit.{query.format}"'}
    return StreamingResponse(write(found), media_type=kind, headers=headers)


async def _objects(
    entries: AsyncIterator[Recorded], query: AuditQuery, *, own: bool
) -> AsyncIterator[dict[str, Any]]:
    async for recorded in entries:
        entry = recorded.entry
        if own and entry.by == OPERATOR.id:
            entry = msgspec.structs.replace(entry, actor=OPERATOR.id, address="", request_id="")
        if query.takes(entry):
            yield _object(recorded, entry)


def _object(recorded: Recorded, entry: Entry) -> dict[str, Any]:
    position = recorded.position
    return {
        "id": str(position),
        "object": "audit.entry",
        "time": position.milliseconds / 1000,
        "tenant": position.tenant,
        "actor": entry.actor,
        "by": entry.by,
        "action": entry.action,
        "target": entry.target,
        "outcome": entry.outcome,
        "status": entry.status or None,
        "address": entry.address,
        "request_id": entry.request_id,
        "details": entry.details,
    }


async def _first(found: AsyncIterator[dict[str, Any]], count: int) -> AsyncIterator[dict[str, Any]]:
    async for item in found:
        yield item
        count -= 1
        if not count:
            return


async def _jsonl(found: AsyncIterator[dict[str, Any]]) -> AsyncIterator[bytes]:
    async for item in found:
        yield msgspec.json.encode(item) + b"\n"


async def _csv(found: AsyncIterator[dict[str, Any]]) -> AsyncIterator[str]:
    yield _row(COLUMNS)
    async for item in found:
        details = msgspec.json.encode(item["details"]).decode() if item["details"] else ""
        yield _row([item[column] for column in COLUMNS[:-1]] + [details])


def _row(cells: Sequence[Any]) -> str:
    """No cell of it is a formula, whatever text a caller has put there."""
    text = io.StringIO()
    safe = ["" if cell is None else f"'{cell}" if str(cell).startswith(FORMULA) else cell for cell in cells]
    csv.writer(text).writerow(safe)
    return text.getvalue()
