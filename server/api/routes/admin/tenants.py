"""/admin/tenants: tenants, for the operator. The first key's secret is shown once."""

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Response
from pydantic import Field

from server.api.http.body_model import Body
from server.api.http.dependencies import CurrentChange, Deps, operator
from server.api.http.error_responses import json_response
from server.api.http.json_body import json_body
from server.tenancy.tenants import Tenant

router = APIRouter(prefix="/admin", dependencies=[Depends(operator)])


class TenantBody(Body):
    name: str
    weight: Annotated[float, Field(gt=0, le=1000)] = 1.0


@router.post("/tenants", status_code=201)
async def create_tenant(
    deps: Deps, change: CurrentChange, body: Annotated[TenantBody, Depends(json_body(TenantBody))]
) -> Response:
    tenant, secret = await deps.tenants.create(body.name, body.weight)
    change.of(tenant.id, tenant=tenant.id, name=tenant.name, weight=tenant.weight)
    return json_response(_tenant_object(tenant) | {"key": secret}, 201)


@router.get("/tenants")
async def list_tenants(deps: Deps) -> Response:
    return json_response({"object": "list", "data": [_tenant_object(t) for t in await deps.tenants.list()]})


@router.get("/tenants/{tenant_id}")
async def get_tenant(deps: Deps, tenant_id: str) -> Response:
    return json_response(_tenant_object(await deps.tenants.get(tenant_id)))


def _tenant_object(tenant: Tenant) -> dict[str, Any]:
    return {
        "id": tenant.id,
        "object": "tenant",
        "name": tenant.name,
        "weight": tenant.weight,
        "created": tenant.created,
    }
