"""FastAPI dependencies of the routes: the services, the calling tenant, the operator, the acting key.

Every router but health has one that authenticates. The key is taken from the Authorization header alone,
never from the query string.

Limits on a tenant's requests come with the tenant, in one call of Valkey; rate_limits.py applies them.
"""

from typing import Annotated

from fastapi import Depends, Request

from server.api.services import Services
from server.errors import Forbidden, Unauthenticated
from server.tenancy.keys import fingerprint, same_secret
from server.tenancy.tenants import OPERATOR, Access, Tenant
from server.tracing import annotate, span

__all__ = ["OPERATOR", "CurrentTenant", "Deps", "current_tenant", "operator", "services"]


def services(request: Request) -> Services:
    deps: Services = request.app.state.services
    return deps


Deps = Annotated[Services, Depends(services)]


async def current_tenant(request: Request, deps: Deps) -> Tenant:
    """The tenant whose key the request carries. Raises Unauthenticated."""
    with span("auth"):
        secret = bearer(request)
        operator = same_secret(secret, deps.operator_secret)
        found = deps.operator_access if operator else await deps.tenants.authenticate(secret)
    if found is None:
        raise Unauthenticated("The API key is not valid.")
    request.state.access, tenant = found, found.tenant
    request.state.tenant = tenant  # for the metrics of RequestMiddleware
    annotate({"polypeft.tenant": tenant.id})
    return tenant


async def operator(tenant: Annotated[Tenant, Depends(current_tenant)]) -> None:
    """Raises Forbidden for a tenant's key, Unauthenticated for none."""
    if tenant is not OPERATOR:
        raise Forbidden("This route needs the operator's key.")


CurrentTenant = Annotated[Tenant, Depends(current_tenant)]


async def current_access(request: Request, _tenant: CurrentTenant) -> Access:
    """The tenant with the limits in force. The operator's own requests have no rates."""
    access: Access = request.state.access
    return access


CurrentAccess = Annotated[Access, Depends(current_access)]


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
    """The secret in the Authorization header. Raises Unauthenticated."""
    headers = request.headers.getlist("authorization")
    scheme, _, secret = headers[0].partition(" ") if len(headers) == 1 else ("", "", "")
    if scheme.lower() != "bearer" or not secret.strip():
        raise Unauthenticated("Send your API key as one header `Authorization: Bearer KEY`.")
    return secret.strip()
