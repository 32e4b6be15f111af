"""/v1/adapters/{name}/pin: adapters that a tenant wants on the device before anybody asks for them.

What a pin names, it names as a request does, and follows: `poet` is whatever version `poet` answers with. The
engine keeps pinned adapters as far as half of the tenant's share goes; the others of its share stay free for
its other adapters.
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

LOOK_SECONDS = 2.0
log = logging.getLogger(__name__)


@router.post("/{name}/pin")
async def pin(deps: Deps, tenant: CurrentTenant, name: str) -> Response:
    """Raises ModelNotFound, and QuotaExceeded past `max_pins_per_tenant`."""
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
    """Also of what there is no more; its adapter stays where it is until its room is needed."""
    await deps.pins.remove(tenant.id, name)
    return json_response({"object": "adapter.pin", "id": name, "pinned": False})


async def keep_pins(deps: Services, sleep: Callable[[float], Awaitable[None]] = asyncio.sleep) -> None:
    """Tell the engine what is pinned: when it starts, and within seconds of any change, be it a pin, an alias
    that moved, a new version or another process's doing.
    """
    told: tuple[str | None, tuple[AdapterRef, ...]] = (None, ())
    while True:
        try:
            boot, pinned = deps.engine.boot, await _pinned(deps)
        except Unavailable as error:
            log.warning("What is pinned could not be read: %s", error)
        else:
            if boot is not None and (boot, pinned) != told and deps.engine.pin(pinned):
                told = (boot, pinned)
        await sleep(LOOK_SECONDS)


async def _pinned(deps: Services) -> tuple[AdapterRef, ...]:
    """The versions that are pinned now; what does not exist is left out until it does."""
    found: dict[str, AdapterRef] = {}
    if deps.engine.base is None:
        return ()
    for tenant, model in await deps.pins.all():
        try:
            version = await deps.registry.resolve(tenant, *split_model(deps, model))
        except NotFound:
            continue
        found.setdefault(version.digest, adapter_ref(version))
    return tuple(found.values())
