"""/admin/tenants/{id}/keys: the keys of a tenant, and of the operator, whose id is `operator`."""

from fastapi import APIRouter, Depends, Response

from server.api.http.dependencies import CurrentCaller, CurrentChange, Deps, operator
from server.api.routes.keys import NewKey, Rotation, create, list_of, revoke, rotate

router = APIRouter(prefix="/admin", dependencies=[Depends(operator)])


@router.post("/tenants/{tenant_id}/keys", status_code=201)
async def create_key(
    deps: Deps, caller: CurrentCaller, change: CurrentChange, tenant_id: str, body: NewKey
) -> Response:
    return await create(deps, caller, change, tenant_id, body)


@router.get("/tenants/{tenant_id}/keys")
async def list_keys(deps: Deps, tenant_id: str) -> Response:
    return await list_of(deps, tenant_id)


@router.post("/tenants/{tenant_id}/keys/{key_id}/rotate")
async def rotate_key(
    deps: Deps, caller: CurrentCaller, change: CurrentChange, tenant_id: str, key_id: str, body: Rotation
) -> Response:
    return await rotate(deps, caller, change, tenant_id, key_id, body)


@router.delete("/tenants/{tenant_id}/keys/{key_id}")
async def revoke_key(deps: Deps, tenant_id: str, key_id: str) -> Response:
    """The key is refused from the next request on, in every process."""
    return await revoke(deps, tenant_id, key_id)
