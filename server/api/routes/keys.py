"""/v1/keys: a tenant's API keys. A secret is shown only when it is made. The operator's: admin/keys.py.

A tenant changes its keys with a key of all scopes, and makes none that may do more than that one: no longer
life, and no addresses beyond its own.
"""

import time
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request, Response
from pydantic import BeforeValidator, Field

from server.api.http.audited import Change
from server.api.http.body_model import LAST_SECOND, Body, at_most_entries
from server.api.http.dependencies import CurrentCaller, CurrentChange, Deps, current_tenant
from server.api.http.error_responses import json_response
from server.api.http.json_body import parse, read_body, validate
from server.api.http.request_limits import max_body_bytes
from server.api.services import Services
from server.errors import Conflict
from server.tenancy.key_terms import ALL_SCOPES, MAX_ADDRESSES, MAX_LIFE_SECONDS, new_key_info
from server.tenancy.tenant_keys import MAX_OVERLAP_SECONDS, Key, new_key_id
from server.tenancy.tenants import OPERATOR, OPERATOR_KEY, Caller

router = APIRouter(prefix="/v1/keys", dependencies=[Depends(current_tenant)])

DEFAULT_OVERLAP_SECONDS = 3600


class KeyBody(Body):
    """A new key; what is absent does not limit it."""

    name: str = ""
    scopes: Annotated[list[str], BeforeValidator(at_most_entries(len(ALL_SCOPES)))] | None = None
    expires_at: Annotated[int, Field(ge=0, le=LAST_SECOND)] | None = None  # Unix seconds
    expires_in: Annotated[int, Field(ge=1, le=MAX_LIFE_SECONDS)] | None = None  # seconds
    addresses: Annotated[list[str], BeforeValidator(at_most_entries(MAX_ADDRESSES))] | None = None


class RotateBody(Body):
    overlap_seconds: Annotated[int, Field(ge=0, le=MAX_OVERLAP_SECONDS)] = DEFAULT_OVERLAP_SECONDS


async def _key_body(request: Request, deps: Deps) -> KeyBody:
    return validate(KeyBody, await _fields(request, deps), deps.settings)


async def _rotate_body(request: Request, deps: Deps) -> RotateBody:
    return validate(RotateBody, await _fields(request, deps), deps.settings)


NewKey = Annotated[KeyBody, Depends(_key_body)]
Rotation = Annotated[RotateBody, Depends(_rotate_body)]


@router.post("")
async def create_key(deps: Deps, caller: CurrentCaller, change: CurrentChange, body: NewKey) -> Response:
    return await create(deps, caller, change, caller.tenant.id, body)


@router.get("")
async def list_keys(deps: Deps, caller: CurrentCaller) -> Response:
    return await list_of(deps, caller.tenant.id)


@router.post("/{key_id}/rotate")
async def rotate_key(
    deps: Deps, caller: CurrentCaller, change: CurrentChange, key_id: str, body: Rotation
) -> Response:
    """A new secret; the one before is valid for `overlap_seconds` more (an hour)."""
    return await rotate(deps, caller, change, caller.tenant.id, key_id, body)


@router.delete("/{key_id}")
async def revoke_key(deps: Deps, caller: CurrentCaller, key_id: str) -> Response:
    """The key is refused from the next request on, in every process; also the one that asks."""
    return await revoke(deps, caller.tenant.id, key_id)


async def create(deps: Services, caller: Caller, change: Change, tenant_id: str, body: KeyBody) -> Response:
    info = new_key_info(new_key_id(), time.time(), **body.model_dump(exclude_none=True))
    if tenant_id == caller.tenant.id:
        caller.key.check_covers(info)
    change.of(info.id, name=info.name, scopes=info.scopes, expires_at=info.expires, addresses=info.addresses)
    info, secret = await deps.tenants.add_key(tenant_id, info)
    return json_response(key_object(Key(info)) | {"secret": secret}, 201)


async def list_of(deps: Services, tenant_id: str) -> Response:
    keys = await deps.tenants.keys(tenant_id)
    if tenant_id == OPERATOR.id:
        keys.insert(0, Key(OPERATOR_KEY))
    return json_response({"object": "list", "data": [key_object(key) for key in keys]})


async def rotate(
    deps: Services, caller: Caller, change: Change, tenant_id: str, key_id: str, body: RotateBody
) -> Response:
    change.of(key_id, overlap_seconds=body.overlap_seconds)
    _refuse_first(tenant_id, key_id)
    if tenant_id == caller.tenant.id:
        caller.key.check_covers(await deps.tenants.key(tenant_id, key_id))
    key, secret = await deps.tenants.rotate(tenant_id, key_id, body.overlap_seconds)
    return json_response(key_object(key) | {"secret": secret})


async def revoke(deps: Services, tenant_id: str, key_id: str) -> Response:
    _refuse_first(tenant_id, key_id)
    await deps.tenants.revoke(tenant_id, key_id)
    return json_response({"id": key_id, "object": "key", "deleted": True})


def _refuse_first(tenant_id: str, key_id: str) -> None:
    """Raise Conflict for the operator's key out of a file, so that one full key always remains."""
    if (tenant_id, key_id) == (OPERATOR.id, OPERATOR_KEY.id):
        raise Conflict(
            "The operator's first key is in a file of the server: put another one there and restart."
        )


async def _fields(request: Request, deps: Services) -> dict[str, Any]:
    """Those of the body; none for an empty one."""
    raw = await read_body(request, max_body_bytes(deps))
    return parse(raw) if raw else {}


def key_object(key: Key) -> dict[str, Any]:
    return {
        "id": key.info.id,
        "object": "key",
        "created": key.info.created,
        "name": key.info.name,
        "scopes": key.info.scopes,
        "expires_at": key.info.expires,
        "addresses": key.info.addresses,
        "last_used_at": key.last_used,  # to about a minute
        "overlap_until": key.overlap_until,  # the secret before the last rotation is valid until then
    }
