"""GET /v1/usage: what the tenant used, day by day, as OpenAI's organization/usage/completions has it."""

import time
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request, Response

from server.api.http.dependencies import CurrentTenant, Deps, current_tenant
from server.api.http.usage_page import check_format, usage_response
from server.api.services import Services
from server.errors import InvalidField, shown
from server.usage.query import DEFAULT_DAYS, parse_query
from server.usage.record import SECONDS_A_DAY
from server.usage.report import read_page

router = APIRouter(dependencies=[Depends(current_tenant)])

MAX_GROUP_BY = 16


class UsageParameters:
    """The parameters of a page of usage, in our names or OpenAI's."""

    def __init__(
        self,
        start: str | None = None,
        end: str | None = None,
        start_time: str | None = None,
        end_time: str | None = None,
        bucket_width: str = "1d",
        group_by: Annotated[list[str] | None, Query()] = None,
        group_by_list: Annotated[list[str] | None, Query(alias="group_by[]")] = None,
        adapter: str | None = None,
        key: str | None = None,
        limit: int = DEFAULT_DAYS,
        page: str | None = None,
        format: str | None = None,  # noqa: A002 - its name in the query
    ) -> None:
        if bucket_width != "1d":
            raise InvalidField(f"bucket_width must be 1d, not {shown(bucket_width)}.", param="bucket_width")
        self.format = format
        groups = [name for text in (group_by or group_by_list or []) for name in text.split(",") if name]
        if len(groups) > MAX_GROUP_BY:
            raise InvalidField(f"group_by has over {MAX_GROUP_BY} names.", param="group_by")
        self.given: dict[str, Any] = {
            "start": start or start_time,
            "end": end or end_time,
            "group_by": groups,
            "adapter": adapter,
            "key": key,
            "limit": limit,
            "page": page,
        }


Parameters = Annotated[UsageParameters, Depends()]


@router.get("/v1/usage")
@router.get("/v1/organization/usage/completions")
async def get_usage(request: Request, deps: Deps, tenant: CurrentTenant, parameters: Parameters) -> Response:
    """Of the calling tenant alone; of another tenant's key there is nothing to see."""
    return await usage_page(request, deps, parameters, tenant.id)


async def usage_page(
    request: Request,
    deps: Services,
    parameters: UsageParameters,
    tenant: str | None,
    *,
    with_tenants: bool = False,
) -> Response:
    """A page of one tenant, or of all; `with_tenants`: it may be grouped by them. Raises InvalidField."""
    media_type = check_format(request, parameters.format)
    today = int(time.time() // SECONDS_A_DAY)
    query = parse_query(today=today, **parameters.given, with_tenants=with_tenants)
    base = deps.settings.base_id if deps.engine.base is None else deps.engine.base.id
    if query.adapter == base:
        query = query._replace(adapter="")
    await deps.ledger.flush()  # what this process has just seen
    return usage_response(await read_page(deps.ledger.counts, query, tenant), media_type, base)
