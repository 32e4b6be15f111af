"""/v1/keys/{key}/limits and /v1/adapters/{name}/limits: a tenant divides its limits among keys and adapters.

None of them may be above the tenant's own; the tightest holds. They are replaced and conditional as the
operator's (admin/limits.py), which are the same records: the last to write holds.
"""

from typing import Annotated

from fastapi import APIRouter, Depends, Response

from server.api.http.dependencies import CurrentAccess, Deps, current_tenant
from server.api.http.error_responses import json_response
from server.api.http.etags import MatchOnly, etag_header
from server.api.http.json_body import json_body
from server.api.http.limit_bodies import RequestLimitsBody, request_limits_object
from server.api.services import Services
from server.tenancy.limit_records import Stored
from server.tenancy.limits import RequestLimits
from server.tenancy.tenants import Tenant

router = APIRouter(prefix="/v1", dependencies=[Depends(current_tenant)])

LimitsOfRequests = Annotated[RequestLimitsBody, Depends(json_body(RequestLimitsBody))]


@router.get("/keys/{key_id}/limits")
async def get_key_limits(deps: Deps, access: CurrentAccess, key_id: str) -> Response:
    return await show_key(deps, access.tenant, key_id)


@router.put("/keys/{key_id}/limits")
async def set_key_limits(
    deps: Deps, access: CurrentAccess, key_id: str, condition: MatchOnly, body: LimitsOfRequests
) -> Response:
    limits = body.limits(deps, within=access.limits)
    await deps.limits.set_key(access.tenant.id, key_id, limits, condition)
    return await show_key(deps, access.tenant, key_id)


@router.get("/adapters/{name}/limits")
async def get_adapter_limits(deps: Deps, access: CurrentAccess, name: str) -> Response:
    return await show_adapter(deps, access.tenant, name)


@router.put("/adapters/{name}/limits")
async def set_adapter_limits(
    deps: Deps, access: CurrentAccess, name: str, condition: MatchOnly, body: LimitsOfRequests
) -> Response:
    limits = body.limits(deps, within=access.limits)
    return await set_adapter(deps, access.tenant, name, limits, condition)


async def show_key(deps: Services, tenant: Tenant, key_id: str) -> Response:
    """Raises NotFound."""
    return await _shown(deps, tenant, "key", key_id, await deps.limits.of_key(tenant.id, key_id))


async def show_adapter(deps: Services, tenant: Tenant, name: str) -> Response:
    """Raises ModelNotFound."""
    await deps.registry.get(tenant.id, name)
    return await _shown(deps, tenant, "adapter", name, await deps.limits.of_adapter(tenant.id, name))


async def set_adapter(
    deps: Services, tenant: Tenant, name: str, limits: RequestLimits, condition: str
) -> Response:
    """Raises ModelNotFound, unless the limits of an adapter that was deleted are removed."""
    if limits != RequestLimits():
        await deps.registry.get(tenant.id, name)
    stored = await deps.limits.set_adapter(tenant.id, name, limits, condition)
    return await _shown(deps, tenant, "adapter", name, stored)


async def _shown(
    deps: Services, tenant: Tenant, kind: str, id_: str, stored: Stored[RequestLimits]
) -> Response:
    ids = {"tenant": tenant.id, kind: id_}
    of_tenant = await deps.limits.in_force(tenant.id)
    answer = request_limits_object(deps, kind, ids, stored, of_tenant)
    return json_response(answer, headers=etag_header(stored.etag))
