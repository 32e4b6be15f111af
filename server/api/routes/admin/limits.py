"""/admin/tenants/{id}/limits: what the operator allows a tenant, one of its keys, one of its adapters.

All limits of one are replaced at a time, and hold from the next request on, in every process. With If-Match,
only if nobody has changed them since they were read.
"""

from typing import Annotated

from fastapi import APIRouter, Depends, Response

from server.api.http.dependencies import CurrentChange, Deps, operator
from server.api.http.error_responses import json_response
from server.api.http.etags import MatchOnly, etag_header
from server.api.http.json_body import json_body
from server.api.routes import own_limits
from server.api.routes.own_limits import LimitsBody, LimitsOfRequests, tenant_limits_object

router = APIRouter(prefix="/admin/tenants/{tenant_id}", dependencies=[Depends(operator)])


@router.get("/limits")
async def get_limits(deps: Deps, tenant_id: str) -> Response:
    stored = await deps.limits.of_tenant(tenant_id)
    return json_response(tenant_limits_object(deps, tenant_id, stored), headers=etag_header(stored.etag))


@router.put("/limits")
async def set_limits(
    deps: Deps,
    change: CurrentChange,
    tenant_id: str,
    condition: MatchOnly,
    body: Annotated[LimitsBody, Depends(json_body(LimitsBody))],
) -> Response:
    change.of(**body.model_dump(exclude_none=True))
    stored = await deps.limits.set_tenant(tenant_id, body.of_tenant(deps), condition)
    return json_response(tenant_limits_object(deps, tenant_id, stored), headers=etag_header(stored.etag))


@router.get("/keys/{key_id}/limits")
async def get_key_limits(deps: Deps, tenant_id: str, key_id: str) -> Response:
    return await own_limits.show_key(deps, await deps.tenants.get(tenant_id), key_id)


@router.put("/keys/{key_id}/limits")
async def set_key_limits(
    deps: Deps,
    change: CurrentChange,
    tenant_id: str,
    key_id: str,
    condition: MatchOnly,
    body: LimitsOfRequests,
) -> Response:
    tenant = await deps.tenants.get(tenant_id)
    change.of(key_id, **body.model_dump(exclude_none=True))
    await deps.limits.set_key(tenant_id, key_id, body.limits(deps), condition)
    return await own_limits.show_key(deps, tenant, key_id)


@router.get("/adapters/{adapter}/limits")
async def get_adapter_limits(deps: Deps, tenant_id: str, adapter: str) -> Response:
    return await own_limits.show_adapter(deps, await deps.tenants.get(tenant_id), adapter)


@router.put("/adapters/{adapter}/limits")
async def set_adapter_limits(
    deps: Deps,
    change: CurrentChange,
    tenant_id: str,
    adapter: str,
    condition: MatchOnly,
    body: LimitsOfRequests,
) -> Response:
    tenant = await deps.tenants.get(tenant_id)
    change.of(adapter, **body.model_dump(exclude_none=True))
    return await own_limits.set_adapter(deps, tenant, adapter, body.limits(deps), condition)
