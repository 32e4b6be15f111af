"""/admin/tenants/{id}/keys: a tenant's API keys. A secret is shown only when it is made."""

from typing import Any

from fastapi import APIRouter, Depends, Response

from server.api.http.dependencies import Deps, operator
from server.api.http.error_responses import json_response
from server.tenancy.tenants import KeyInfo

router = APIRouter(prefix="/admin", dependencies=[Depends(operator)])


@router.post("/tenants/{tenant_id}/keys", status_code=201)
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


def _key_object(key: KeyInfo) -> dict[str, Any]:
    return {"id": key.id, "object": "key", "created": key.created}
