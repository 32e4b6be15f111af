"""GET /admin/usage: what all tenants used, or one of them, for the operator."""

from fastapi import APIRouter, Depends, Request, Response

from server.api.http.dependencies import OPERATOR, Deps, operator
from server.api.routes.usage import Parameters, usage_page

router = APIRouter(prefix="/admin", dependencies=[Depends(operator)])


@router.get("/usage")
async def get_all_usage(
    request: Request, deps: Deps, parameters: Parameters, tenant: str | None = None
) -> Response:
    """Raises NotFound for a `tenant` that there is not."""
    if tenant not in (None, OPERATOR.id):
        await deps.tenants.get(tenant)
    return await usage_page(request, deps, parameters, tenant, with_tenants=True)
