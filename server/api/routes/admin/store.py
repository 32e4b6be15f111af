"""/admin: index rebuild, garbage collection, verification, uploads for a tenant. For the operator."""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from pathlib import Path
from typing import Annotated, Any

from anyio.to_thread import run_sync
from fastapi import APIRouter, Depends, Request, Response

from adapters_store.maintenance.stale_temp_files import remove_stale_temp_files
from server.api.http.body_model import Body
from server.api.http.dependencies import Actor, CurrentChange, Deps, operator
from server.api.http.error_responses import json_response
from server.api.http.json_body import json_body
from server.api.http.streaming import open_stream
from server.api.http.temp_files import temp_folder
from server.api.routes.adapters.adapters import ADAPTER_FORM, receive_adapter
from server.api.schema.objects import STREAM
from server.api.services import Services

router = APIRouter(prefix="/admin", dependencies=[Depends(operator)])

MAX_KEYS_SHOWN = 100  # in an answer; its counts are of all


class CollectBody(Body):
    dry_run: bool = False


@router.post("/tenants/{tenant_id}/adapters", status_code=201, openapi_extra=ADAPTER_FORM)
async def upload_for_tenant(
    request: Request, deps: Deps, actor: Actor, change: CurrentChange, tenant_id: str
) -> Response:
    """As POST /v1/adapters; the adapter belongs to the tenant."""
    tenant = await deps.tenants.get(tenant_id)
    return await receive_adapter(request, deps, tenant, actor, change)


@router.post("/rebuild-index")
async def rebuild_index(deps: Deps) -> Response:
    """Rebuild a lost or damaged index from the manifests in the store. Aliases cannot be restored."""
    return json_response({"object": "index", "versions": await deps.registry.rebuild_index()})


@router.post("/gc")
async def collect(deps: Deps, body: Annotated[CollectBody, Depends(json_body(CollectBody))]) -> Response:
    """Delete, or only list, objects that no version and no running upload needs; purge what is due."""
    settings = deps.settings
    if not body.dry_run:
        await deps.registry.finish_deletes()
    garbage = await deps.registry.collector.collect(dry_run=body.dry_run)
    drafts = await run_sync(
        lambda: remove_stale_temp_files(settings.store_url, settings.grace_seconds, dry_run=body.dry_run)
    )
    return json_response(
        {
            "object": "garbage",
            "dry_run": body.dry_run,
            "blobs": len(garbage.keys),
            "bytes": garbage.bytes,
            "drafts": len(drafts),
            "keys": [*garbage.keys, *drafts][:MAX_KEYS_SHOWN],
            "skipped_tenants": garbage.unreadable,
        }
    )


@router.post("/verify", response_class=Response, responses=STREAM)
async def verify(request: Request, deps: Deps) -> Response:
    """Server-sent events: progress and findings, for each object."""
    return await open_stream(request, _steps(deps))


async def _steps(deps: Services) -> AsyncGenerator[dict[str, Any], None]:
    with temp_folder(deps.settings) as folder:
        yield {"object": "verify.step", "done": 0, "total": None, "findings": []}
        async with aclosing(deps.registry.verifier.run(Path(folder))) as steps:
            async for step in steps:
                findings = [
                    {"kind": f.kind, "key": f.key, "version": f.version or None, "fault": f.fault}
                    for f in step.findings
                ]
                yield {
                    "object": "verify.step",
                    "done": step.done,
                    "total": step.total,
                    "findings": findings,
                }
