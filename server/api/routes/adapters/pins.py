"""/v1/adapters/{name}/pin: adapters that stay on the device, so that the first request does not load them.

A pin is a model name as in a request, resolved as one: `poet` pins the version that `poet` answers with.
Pinned adapters take up to half of the tenant's share of the device; the rest stays for its other adapters.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable

from fastapi import APIRouter, Depends, Response

from server.api.generation.model_selection import adapter_ref, find_version, split_model
from server.api.http.dependencies import CurrentTenant, Deps, current_tenant
from server.api.http.error_responses import json_response
from server.api.services import Services
from server.errors import NotFound, Unavailable
from server.messages import AdapterRef

router = APIRouter(prefix="/v1/adapters", dependencies=[Depends(current_tenant)])

POLL_SECONDS = 2.0
log = logging.getLogger(__name__)


@router.post("/{name}/pin")
async def pin(deps: Deps, tenant: CurrentTenant, name: str) -> Response:
    """Raises ModelNotFound, and QuotaExceeded over `max_pins_per_tenant`."""
    version = await find_version(deps, tenant, name)
    await deps.pins.add(tenant.id, name)
    deps.engine.prefetch(adapter_ref(version))
    return json_response({"object": "adapter.pin", "id": name, "pinned": True, "version": version.version})


@router.get("/{name}/pin")
async def get_pin(deps: Deps, tenant: CurrentTenant, name: str) -> Response:
    version = await find_version(deps, tenant, name)
    pinned = name in await deps.pins.of(tenant.id)
    return json_response({"object": "adapter.pin", "id": name, "pinned": pinned, "version": version.version})


@router.delete("/{name}/pin")
async def unpin(deps: Deps, tenant: CurrentTenant, name: str) -> Response:
    """Also for a name that no longer exists. The adapter stays on the device until its memory is needed."""
    await deps.pins.remove(tenant.id, name)
    return json_response({"object": "adapter.pin", "id": name, "pinned": False})


async def keep_pins(deps: Services, sleep: Callable[[float], Awaitable[None]] = asyncio.sleep) -> None:
    """Send the engine the pinned versions when it starts and whenever they change: by a pin, a moved alias or
    a new version, in any process. Runs until cancelled.
    """
    sent: tuple[str | None, tuple[AdapterRef, ...]] = (None, ())
    while True:
        try:
            boot, pinned = deps.engine.boot, await _pinned(deps)
        except Unavailable as error:
            log.warning("What is pinned could not be read: %s", error)
        else:
            if boot is not None and (boot, pinned) != sent and deps.engine.pin(pinned):
                sent = (boot, pinned)
        await sleep(POLL_SECONDS)


async def _pinned(deps: Services) -> tuple[AdapterRef, ...]:
    """The pinned versions of all tenants, each once; names that do not exist are left out."""
    refs: dict[str, AdapterRef] = {}  # by digest
    if deps.engine.base is None:
        return ()
    for tenant, model in await deps.pins.all():
        try:
            version = await deps.registry.resolve(tenant, *split_model(deps, model))
        except NotFound:
            continue
        refs.setdefault(version.digest, adapter_ref(version))
    return tuple(refs.values())
