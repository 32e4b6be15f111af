"""GET /admin/audit: the audit log of all tenants and of the operator, or of one."""

from typing import Annotated

from fastapi import APIRouter, Depends, Query, Response

from server.api.http.dependencies import OPERATOR, Deps, operator
from server.api.routes.audit import AuditQuery, answer

router = APIRouter(prefix="/admin", dependencies=[Depends(operator)])


class AllQuery(AuditQuery):
    tenant: str | None = None  # `operator`: what belongs to no tenant


@router.get("/audit")
async def get_audit(deps: Deps, query: Annotated[AllQuery, Query()]) -> Response:
    """As GET /v1/audit."""
    if query.tenant is not None:
        if query.tenant != OPERATOR.id:
            await deps.tenants.get(query.tenant)
        return await answer(deps, [query.tenant], query, own=False)
    tenants = [tenant.id for tenant in await deps.tenants.list()]
    return await answer(deps, [*tenants, OPERATOR.id], query, own=False)
