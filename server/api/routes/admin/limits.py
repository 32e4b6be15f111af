"""/admin/tenants/{id}/limits: what the operator allows a tenant."""

from typing import Annotated, Any

import msgspec
from fastapi import APIRouter, Depends, Response
from pydantic import Field, ValidationInfo, field_validator

from server.api.generation.engine_requests import max_context
from server.api.http.body_model import Body, at_most, caps
from server.api.http.dependencies import CurrentChange, Deps, operator
from server.api.http.error_responses import json_response
from server.api.http.json_body import json_body
from server.api.services import Services
from server.settings import MAX_LIMIT
from server.tenancy.limits import Limits

router = APIRouter(prefix="/admin", dependencies=[Depends(operator)])

Limit = Annotated[int, Field(ge=1, le=MAX_LIMIT)]


class LimitsBody(Body):
    """All of a tenant's limits; null or absent: the server's default."""

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


@router.get("/tenants/{tenant_id}/limits")
async def get_limits(deps: Deps, tenant_id: str) -> Response:
    return json_response(_limits_object(deps, tenant_id, await deps.tenants.limits(tenant_id)))


@router.put("/tenants/{tenant_id}/limits")
async def set_limits(
    deps: Deps,
    change: CurrentChange,
    tenant_id: str,
    body: Annotated[LimitsBody, Depends(json_body(LimitsBody))],
) -> Response:
    """All are replaced, and hold from the next request on, in every process."""
    if body.max_context is not None:
        at_most("max_context", body.max_context, deps.max_context)
    limits = Limits(**body.model_dump())
    change.of(**body.model_dump(exclude_none=True))
    await deps.tenants.set_limits(tenant_id, limits)
    return json_response(_limits_object(deps, tenant_id, limits))


def _limits_object(deps: Services, tenant_id: str, limits: Limits) -> dict[str, Any]:
    """What is set (null: nothing) and what is in force (null: no limit)."""
    in_force = limits.over(deps.tenants.defaults)
    return {
        "object": "tenant.limits",
        "tenant": tenant_id,
        "set": msgspec.structs.asdict(limits),
        "in_force": msgspec.structs.asdict(in_force) | {"max_context": max_context(deps, in_force)},
    }
