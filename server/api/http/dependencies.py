"""FastAPI dependencies of the routes: the services, the calling tenant, the operator, the acting key.

Every router but health has one that authenticates. The key is taken from the Authorization header, or from
`api-key` or `x-api-key` where that is absent; never from the query string. What a route takes of a key is in
server/api/access.py.

Key and limits come with the tenant, in one call of Valkey; rate_limits.py applies the limits.
"""

from typing import Annotated

from fastapi import Depends, Request

from server.api.access import OPERATORS_ROUTES, access_to, check_scopes
from server.api.http.audited import Change, begin_change
from server.api.services import Services
from server.errors import Forbidden, Unauthenticated, shown
from server.tenancy.keys import fingerprint, same_secret
from server.tenancy.tenants import OPERATOR, OPERATOR_KEY, Caller, Tenant
from server.tracing import annotate, span

__all__ = ["OPERATOR", "CurrentTenant", "Deps", "current_tenant", "operator", "services"]


def services(request: Request) -> Services:
    deps: Services = request.app.state.services
    return deps


KEY_HEADERS = ("api-key", "x-api-key")  # Azure's and Anthropic's clients send these


Deps = Annotated[Services, Depends(services)]


async def current_tenant(request: Request, deps: Deps) -> Tenant:
    """The tenant whose key the request carries. Raises Unauthenticated, and Forbidden for want of a scope."""
    with span("auth"):
        caller = await authenticate(request, deps)
    request.state.caller = caller
    request.state.tenant = caller.tenant  # for the metrics of RequestMiddleware
    annotate({"polypeft.tenant": caller.tenant.id})
    path = request.scope["route"].path
    access = access_to(request.method, path)
    if access.action:
        await begin_change(request, deps.audit, caller, access.action, client_address(request))
    if path.startswith(OPERATORS_ROUTES) and caller.tenant is not OPERATOR:
        raise Forbidden("This route needs the operator's key.")
    check_scopes(caller.key, access)
    return caller.tenant


async def authenticate(request: Request, deps: Services) -> Caller:
    """Whose key the request carries. Raises Unauthenticated."""
    secret = bearer(request)
    if same_secret(secret, deps.operator_secret):
        return Caller(OPERATOR, deps.tenants.operators_limits, OPERATOR_KEY)
    caller = await deps.tenants.authenticate(secret)
    if caller is None:
        raise Unauthenticated("The API key is not valid.")
    address = client_address(request)
    if not caller.key.allows(address):
        raise Unauthenticated(f"The API key may not be used from {shown(address)}.", code="ip_not_authorized")
    deps.tenants.note_use(caller.tenant.id, caller.key.id)
    return caller


def client_address(request: Request) -> str:
    """The other end of the connection; behind a proxy of `trusted_proxies`, what it says; "" if unknown."""
    return request.client.host if request.client else ""


async def operator(tenant: Annotated[Tenant, Depends(current_tenant)]) -> None:
    """Raises Forbidden for a tenant's key, Unauthenticated for none."""
    if tenant is not OPERATOR:
        raise Forbidden("This route needs the operator's key.")


CurrentTenant = Annotated[Tenant, Depends(current_tenant)]


async def current_caller(request: Request, _tenant: CurrentTenant) -> Caller:
    """The tenant with its key and limits."""
    caller: Caller = request.state.caller
    return caller


CurrentCaller = Annotated[Caller, Depends(current_caller)]


async def current_actor(caller: CurrentCaller) -> str:
    """The author of a change: the id of the key, or "operator" for the operator's first one."""
    return caller.key.id


Actor = Annotated[str, Depends(current_actor)]


async def current_change(request: Request, _tenant: CurrentTenant) -> Change:
    """The entry of the audit log that this request makes; of routes that have an action there."""
    change: Change = request.state.change
    return change


CurrentChange = Annotated[Change, Depends(current_change)]


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
