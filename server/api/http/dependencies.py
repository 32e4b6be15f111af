"""FastAPI dependencies of the routes: the services, the calling tenant, the operator, the acting key.

Every router but health has one that authenticates. The key is taken from the Authorization header, or from
`api-key` or `x-api-key` where that is absent; never from the query string.

Limits on a tenant's requests come with the tenant, in one call of Valkey; rate_limits.py applies them.
"""

from typing import Annotated

from fastapi import Depends, Request

from server.api.services import Services
from server.errors import Forbidden, Unauthenticated
from server.tenancy.keys import fingerprint, same_secret
from server.tenancy.limits import NO_LIMITS, Limits
from server.tenancy.tenants import OPERATOR, Tenant
from server.tracing import annotate, span

__all__ = ["OPERATOR", "CurrentTenant", "Deps", "current_tenant", "operator", "services"]


def services(request: Request) -> Services:
    deps: Services = request.app.state.services
    return deps


KEY_HEADERS = ("api-key", "x-api-key")  # Azure's and Anthropic's clients send these


Deps = Annotated[Services, Depends(services)]


async def current_tenant(request: Request, deps: Deps) -> Tenant:
    """The tenant whose key the request carries. Raises Unauthenticated."""
    with span("auth"):
        secret = bearer(request)
        operator = same_secret(secret, deps.operator_secret)
        found = (OPERATOR, NO_LIMITS) if operator else await deps.tenants.authenticate(secret)
    if found is None:
        raise Unauthenticated("The API key is not valid.")
    tenant, request.state.limits = found
    request.state.tenant = tenant  # for the metrics of RequestMiddleware
    annotate({"polypeft.tenant": tenant.id})
    return tenant


async def operator(tenant: Annotated[Tenant, Depends(current_tenant)]) -> None:
    """Raises Forbidden for a tenant's key, Unauthenticated for none."""
    if tenant is not OPERATOR:
        raise Forbidden("This route needs the operator's key.")


CurrentTenant = Annotated[Tenant, Depends(current_tenant)]


async def current_limits(request: Request, _tenant: CurrentTenant) -> Limits:
    """Those in force for the tenant; none for the operator."""
    limits: Limits = request.state.limits
    return limits


CurrentLimits = Annotated[Limits, Depends(current_limits)]


async def current_actor(request: Request, deps: Deps, tenant: CurrentTenant) -> str:
    """The author of a change, for the audit log: the id of the key, or "operator"; never the secret."""
    if tenant is OPERATOR:
        return OPERATOR.id
    return await deps.tenants.key_id(tenant.id, bearer(request))


Actor = Annotated[str, Depends(current_actor)]


def sticky_key(request: Request, user: str | None) -> str:
    """For aliases with weights: the same key always gets the same version. The `user`, else the API key."""
    return f"user:{user}" if user else f"key:{fingerprint(bearer(request))}"


def bearer(request: Request) -> str:
    """The secret in the Authorization header, or in one of KEY_HEADERS. Raises Unauthenticated."""
    headers = request.headers.getlist("authorization")
    others = [value for name in KEY_HEADERS for value in request.headers.getlist(name)]
    if not headers and len(set(others)) == 1 and others[0].strip():
        return others[0].strip()
    scheme, _, secret = headers[0].partition(" ") if len(headers) == 1 else ("", "", "")
    if scheme.lower() != "bearer" or not secret.strip():
        raise Unauthenticated("Send your API key as one header `Authorization: Bearer KEY`.")
    return secret.strip()
