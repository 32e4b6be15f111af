"""The id of the key that a request carries, for its record in the ledger of usage."""

from fastapi import Request

from server.api.http.dependencies import OPERATOR, CurrentTenant, Deps, bearer


async def find_key_id(request: Request, deps: Deps, tenant: CurrentTenant) -> None:
    """A dependency of generation routes: sets `request.state.key_id`."""
    operator = tenant is OPERATOR
    request.state.key_id = OPERATOR.id if operator else await deps.key_ids.find(tenant.id, bearer(request))
