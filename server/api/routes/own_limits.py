"""/v1/keys/{key}/limits and /v1/adapters/{name}/limits: a tenant divides its limits among keys and adapters.

None of them may be above the tenant's own; the tightest holds. They are replaced and conditional as the
operator's (admin/limits.py), which are the same records: the last to write holds.
"""

from typing import Annotated, Any

import msgspec
from fastapi import APIRouter, Depends, Response
from pydantic import Field, ValidationInfo, field_validator

from server.api.http.body_model import Body, at_most, caps
from server.api.http.dependencies import CurrentCaller, CurrentChange, Deps, current_tenant
from server.api.http.error_responses import json_response
from server.api.http.etags import MatchOnly, etag_header
from server.api.http.json_body import json_body
from server.api.services import Services
from server.messages import Priority
from server.settings import MAX_BYTES_LIMIT, MAX_LIMIT
from server.tenancy.limit_records import Stored
from server.tenancy.limits import Limits, RequestLimits
from server.tenancy.tenants import Tenant

router = APIRouter(prefix="/v1", dependencies=[Depends(current_tenant)])

Limit = Annotated[int, Field(ge=1, le=MAX_LIMIT)]
Count = Annotated[int, Field(ge=0, le=MAX_LIMIT)]  # 0: none at all
Bytes = Annotated[int, Field(ge=0, le=MAX_BYTES_LIMIT)]


class RequestLimitsBody(Body):
    """All limits of a key or an adapter; null or absent: none of its own."""

    requests_per_minute: Limit | None = None
    tokens_per_minute: Limit | None = None
    concurrent_requests: Limit | None = None
    max_context: Limit | None = None
    max_n: Limit | None = None

    @field_validator("max_n")
    @classmethod
    def _max_n(cls, value: int, info: ValidationInfo) -> int:
        at_most("max_n", value, caps(info).max_n)  # of the server
        return value

    def limits(self, deps: Services, within: Limits | None = None) -> RequestLimits:
        """The limits. Raises InvalidField for one that is above the server's, or above `within`."""
        _check(self, deps)
        for name in RequestLimits.__struct_fields__:
            own, most = getattr(self, name), getattr(within, name, None)
            if own is not None and most is not None:
                at_most(name, own, most)
        return RequestLimits(**self.model_dump())


class LimitsBody(RequestLimitsBody):
    """All of a tenant's limits; null or absent: the server's default."""

    queued_tokens: Limit | None = None
    adapters: Count | None = None
    adapter_bytes: Bytes | None = None
    file_bytes: Bytes | None = None
    jobs: Count | None = None
    training_tokens_per_day: Count | None = None
    priority: Priority | None = None

    def of_tenant(self, deps: Services) -> Limits:
        """The limits. Raises InvalidField for one that is above the server's."""
        _check(self, deps)
        return Limits(**self.model_dump())


def tenant_limits_object(deps: Services, tenant: str, stored: Stored[Limits]) -> dict[str, Any]:
    """What is set (null: nothing) and what is in force (null: no limit)."""
    in_force = stored.limits.over(deps.limits.defaults)
    return _object(deps, "tenant.limits", {"tenant": tenant}, stored.limits, in_force)


def request_limits_object(
    deps: Services, kind: str, ids: dict[str, str], stored: Stored[RequestLimits], tenant: Limits
) -> dict[str, Any]:
    """As for a tenant, whose limits are in force where they are tighter."""
    in_force = {}
    for name in RequestLimits.__struct_fields__:
        values = (getattr(stored.limits, name), getattr(tenant, name))
        in_force[name] = min((value for value in values if value is not None), default=None)
    return _object(deps, f"{kind}.limits", ids, stored.limits, RequestLimits(**in_force))


def _object(
    deps: Services, kind: str, ids: dict[str, str], own: RequestLimits, in_force: RequestLimits
) -> dict[str, Any]:
    context = min(deps.max_context, in_force.max_context or deps.max_context)
    return {
        "object": kind,
        **ids,
        "set": msgspec.structs.asdict(own),
        "in_force": msgspec.structs.asdict(in_force) | {"max_context": context},
    }


def _check(body: RequestLimitsBody, deps: Services) -> None:
    if body.max_context is not None:
        at_most("max_context", body.max_context, deps.max_context)


LimitsOfRequests = Annotated[RequestLimitsBody, Depends(json_body(RequestLimitsBody))]


@router.get("/keys/{key_id}/limits")
async def get_key_limits(deps: Deps, caller: CurrentCaller, key_id: str) -> Response:
    return await show_key(deps, caller.tenant, key_id)


@router.put("/keys/{key_id}/limits")
async def set_key_limits(
    deps: Deps,
    caller: CurrentCaller,
    change: CurrentChange,
    key_id: str,
    condition: MatchOnly,
    body: LimitsOfRequests,
) -> Response:
    limits = body.limits(deps, within=caller.limits)
    change.of(key_id, **body.model_dump(exclude_none=True))
    await deps.limits.set_key(caller.tenant.id, key_id, limits, condition)
    return await show_key(deps, caller.tenant, key_id)


@router.get("/adapters/{name}/limits")
async def get_adapter_limits(deps: Deps, caller: CurrentCaller, name: str) -> Response:
    return await show_adapter(deps, caller.tenant, name)


@router.put("/adapters/{name}/limits")
async def set_adapter_limits(
    deps: Deps,
    caller: CurrentCaller,
    change: CurrentChange,
    name: str,
    condition: MatchOnly,
    body: LimitsOfRequests,
) -> Response:
    limits = body.limits(deps, within=caller.limits)
    change.of(name, **body.model_dump(exclude_none=True))
    return await set_adapter(deps, caller.tenant, name, limits, condition)


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
