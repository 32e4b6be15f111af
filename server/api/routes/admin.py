"""/admin: tenants and their API keys, for the operator. A secret is shown only when it is made."""

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Response
from pydantic import Field

from server.api.http.body_model import Body
from server.api.http.dependencies import Deps, operator
from server.api.http.error_responses import json_response
from server.api.http.json_body import json_body
from server.tenancy.tenants import KeyInfo, Tenant

router = APIRouter(prefix="/admin", dependencies=[Depends(operator)])


class TenantBody(Body):
    name: str
    weight: Annotated[float, Field(gt=0, le=1000)] = 1.0


@router.post("/tenants")
async def create_tenant(deps: Deps, body: Annotated[TenantBody, Depends(json_body(TenantBody))]) -> Response:
    tenant, secret = await deps.tenants.create(body.name, body.weight)
    return json_response(_tenant_object(tenant) | {"key": secret}, 201)


@router.get("/tenants")
async def list_tenants(deps: Deps) -> Response:
    return json_response({"object": "list", "data": [_tenant_object(t) for t in await deps.tenants.list()]})


@router.get("/tenants/{tenant_id}")
async def get_tenant(deps: Deps, tenant_id: str) -> Response:
    return json_response(_tenant_object(await deps.tenants.get(tenant_id)))


@router.post("/tenants/{tenant_id}/keys")
async def create_key(deps: Deps, tenant_id: str) -> Response:
    info, secret = await deps.tenants.add_key(tenant_id)
    return json_response(_key_object(info) | {"secret": secret}, 201)


@router.get("/tenants/{tenant_id}/keys")
async def list_keys(deps: Deps, tenant_id: str) -> Response:
    keys = await deps.tenants.keys(tenant_id)
    return json_response({"object": "list", "data": [_key_object(key) for key in keys]})


@router.delete("/tenants/{tenant_id}/keys/{key_id}")
async def revoke_key(deps: Deps, tenant_id: str, key_id: str) -> Response:
    """The key is refused from the next request on, in every process."""
    await deps.tenants.revoke(tenant_id, key_id)
    return json_response({"id": key_id, "object": "key", "deleted": True})


def _tenant_object(tenant: Tenant) -> dict[str, Any]:
    return {
        "id": tenant.id,
        "object": "tenant",
        "name": tenant.name,
        "weight": tenant.weight,
        "created": tenant.created,
    }


def _key_object(key: KeyInfo) -> dict[str, Any]:
    return {"id": key.id, "object": "key", "created": key.created}
