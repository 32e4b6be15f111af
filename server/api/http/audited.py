"""The audit log's entry of a request: begun once the caller is known, ended before the answer is sent.

`current_tenant` begins it and RequestMiddleware ends it, for every route that has an action in
server/api/access.py. A handler adds what it alone knows, by `CurrentChange` (dependencies.py).
"""

from typing import Any

import msgspec
from fastapi import Request

from server.audit.audit_log import OPERATORS, AuditLog, outcome_of
from server.audit.entry import Entry, bounded, named
from server.tenancy.tenants import OPERATOR, Caller


class Change:
    """What a request changes: an entry of the caller's tenant, or of the one that the operator changes."""

    def __init__(self, log: AuditLog, caller: Caller, entry: Entry, affected: str | None) -> None:
        self._log = log
        self._tenant = OPERATORS if caller.tenant is OPERATOR else caller.tenant.id
        self._entry = entry
        self._affected = affected
        self._ended = False

    async def begin(self) -> None:
        """Raises StoreError: then nothing may be changed."""
        await self._log.begin(self._entry.request_id, self._tenant, self._entry)

    def of(self, *names: str, tenant: str | None = None, **details: Any) -> None:
        """Say what is changed; `tenant`: whose it is, if the operator changes it. No secret may be in it."""
        self._entry = msgspec.structs.replace(
            self._entry, target=named(*names), details=bounded(self._entry.details | details)
        )
        self._affected = tenant or self._affected

    async def end(self, status: int) -> None:
        """Write the outcome, once. Raises nothing."""
        if self._ended:
            return
        self._ended = True
        done_for = self._affected if self._tenant == OPERATORS and status < 400 else None
        await self._log.end(self._entry.request_id, done_for or self._tenant, outcome_of(self._entry, status))


async def begin_change(request: Request, log: AuditLog, caller: Caller, action: str, address: str) -> None:
    """Raises StoreError: then nothing may be changed."""
    entry = Entry(
        actor=caller.key.id,
        by=caller.tenant.id,
        action=action,
        target=named(*(value for name, value in request.path_params.items() if name != "tenant_id")),
        address=named(address),
        request_id=request.state.request_id,
    )
    affected = request.path_params.get("tenant_id")
    if affected is not None:
        entry = msgspec.structs.replace(entry, details={"tenant": named(affected)})
    change = Change(log, caller, entry, affected)
    await change.begin()
    request.state.change = change


async def end_change(state: dict[str, Any], status: int) -> None:
    """Write the outcome of a request with this state, if it is one that changes something. Raises nothing."""
    if change := state.get("change"):
        await change.end(status)
