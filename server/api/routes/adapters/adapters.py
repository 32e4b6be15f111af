"""/v1/adapters: a tenant's adapters and their versions: upload, list, download, delete, restore."""

import asyncio
from pathlib import Path
from typing import Annotated, Any

from anyio.to_thread import run_sync
from fastapi import APIRouter, Depends, Query, Request, Response

from adapters_store.manifest import Manifest
from adapters_store.names import MAX_VERSION, version_number
from server.adapters.formats.pickle_sandbox import PICKLES, convert_pickle
from server.api.adapters.json_objects import (
    adapter_object,
    change_object,
    deleted_object,
    uploaded_object,
    version_object,
)
from server.api.adapters.publish import AdapterUpload, publish
from server.api.adapters.upload_form import CONFIG, INTERFACE, adapter_form, check_files
from server.api.generation.model_selection import exact_version
from server.api.http.audited import Change
from server.api.http.dependencies import Actor, CurrentChange, CurrentTenant, Deps, current_tenant
from server.api.http.error_responses import json_response
from server.api.http.etags import MatchOnly, etag_header
from server.api.http.list_page import check_limit, list_page
from server.api.http.multipart import Upload, receive_form
from server.api.http.temp_files import stored_file, temp_folder
from server.api.schema.forms import form
from server.api.services import Services
from server.errors import InvalidField, NotFound, shown
from server.tenancy.tenants import Tenant

router = APIRouter(prefix="/v1/adapters", dependencies=[Depends(current_tenant)])

MAX_PAGE = 100
MAX_EVALUATIONS = 20
ADAPTER_FORM = form(
    "files",
    {
        "name": "The adapter's name; one that exists gets a new version.",
        "sha256": "Of the weights file.",
        "allow_noop": "true: also an adapter that changes no output.",
    },
    many=True,
    required=("name",),
)


@router.post("", status_code=201, openapi_extra=ADAPTER_FORM)
async def upload_adapter(
    request: Request, deps: Deps, tenant: CurrentTenant, actor: Actor, change: CurrentChange
) -> Response:
    """multipart/form-data: `name`, `files` (repeated); optional: `sha256` of the weights file, and
    `allow_noop=true` to accept an adapter that changes no output.

    With `If-None-Match: *` an adapter that exists is a conflict, and gets no version.
    """
    return await receive_adapter(request, deps, tenant, actor, change)


async def receive_adapter(
    request: Request, deps: Services, tenant: Tenant, actor: str, change: Change
) -> Response:
    """Receive and publish an upload for `tenant`, made by `actor`."""
    deps.refuse_if_draining()
    form, seconds = adapter_form(deps.settings), deps.settings.request_seconds
    with temp_folder(deps.settings) as folder:
        upload = await receive_form(request, Path(folder), form, seconds)
        change.of(upload.fields.get("name", ""))
        create_only = request.headers.get("if-none-match") == "*"
        noop = _flag(upload.fields.get("allow_noop", "false"), "allow_noop")
        files = await uploaded_files(deps, upload)
        version = await publish(
            deps,
            tenant,
            upload.fields["name"],
            files,
            create_only=create_only,
            allow_noop=noop,
            actor=actor,
        )
    change.of(f"{version.name}@{version.version}", digest=version.digest)
    headers = {"Location": f"/v1/adapters/{version.name}"}
    return json_response(uploaded_object(version, upload.dropped), 201, headers)


@router.get("")
async def list_adapters(
    deps: Deps,
    tenant: CurrentTenant,
    after: str | None = None,
    limit: Annotated[int, Query()] = MAX_PAGE,
    deleted: str = "false",
) -> Response:
    """By name, `limit` (1 to 100) at a time; `after` is the last name of the previous page.

    With `deleted=true` the deleted versions that can be restored, by name.
    """
    check_limit(limit, MAX_PAGE)
    if _flag(deleted, "deleted"):
        restorable = await deps.registry.deleted(tenant.id, after, limit + 1)
        return list_page([deleted_object(item, deps.registry.retention) for item in restorable], limit)
    adapters = await deps.registry.list(tenant.id, after, limit + 1)
    return list_page([adapter_object(adapter) for adapter in adapters], limit)


@router.get("/{name}")
async def get_adapter(deps: Deps, tenant: CurrentTenant, name: str) -> Response:
    """As in the list, with the evaluations of the newest versions that were trained here."""
    adapter = await deps.registry.get(tenant.id, name)
    trained = [version for version in reversed(adapter.versions) if version.evaluated][:MAX_EVALUATIONS]
    manifests = [deps.registry.manifest(tenant.id, name, version.version) for version in trained]
    evaluations = {manifest.version: manifest.evaluation for manifest in await asyncio.gather(*manifests)}
    answer = adapter_object(adapter) | {"evaluation": evaluations.get(adapter.latest.version)}
    for version in answer["versions"]:
        version["evaluation"] = evaluations.get(version["version"])
    return json_response(answer, headers=etag_header(adapter.etag))


@router.delete("/{name}")
async def delete_adapter(
    deps: Deps,
    tenant: CurrentTenant,
    actor: Actor,
    change: CurrentChange,
    name: str,
    condition: MatchOnly,
    purge: str = "false",
) -> Response:
    """With all versions and aliases. Running requests are not affected.

    It can be restored for `retention_seconds`; with `purge=true` neither it nor earlier deleted versions can.
    """
    forever = _flag(purge, "purge")
    change.of(name, purge=forever)
    await delete(deps, tenant.id, name, None, actor, condition=condition, purge=forever)
    return json_response({"id": name, "object": "adapter", "deleted": True, "purged": forever})


@router.post("/{name}/restore")
async def restore_adapter(
    deps: Deps,
    tenant: CurrentTenant,
    actor: Actor,
    change: CurrentChange,
    name: str,
    version: str | None = None,
) -> Response:
    """Restore the deleted versions of the name, all or one, and the aliases that were deleted with them."""
    number = None if version is None else version_number(version)
    if version is not None and number is None:
        raise InvalidField(
            f"version must be a number from 1 to {MAX_VERSION}, not {shown(version)}.", param="version"
        )
    change.of(name, version=number)
    await deps.registry.restore(tenant.id, name, number, actor=actor)
    adapter = await deps.registry.get(tenant.id, name)
    return json_response(adapter_object(adapter), headers=etag_header(adapter.etag))


@router.get("/{name}/history")
async def get_history(deps: Deps, tenant: CurrentTenant, name: str) -> Response:
    """How versions and aliases changed, newest first; also of a deleted adapter."""
    entries = await deps.registry.history(tenant.id, name)
    return json_response({"object": "list", "data": [change_object(entry) for entry in entries]})


@router.get("/{name}/versions/{version}")
async def get_version(deps: Deps, tenant: CurrentTenant, name: str, version: str) -> Response:
    """As in the list, with facts from the engine: parameters, bytes on the device, ..."""
    resolved = await deps.registry.resolve(tenant.id, name, version)
    manifest = await deps.registry.manifest(tenant.id, name, resolved.version)
    details = {"facts": manifest.facts, "config": manifest.config, "evaluation": manifest.evaluation}
    return json_response(version_object(resolved) | details)


@router.delete("/{name}/versions/{version}")
async def delete_version(
    deps: Deps,
    tenant: CurrentTenant,
    actor: Actor,
    change: CurrentChange,
    name: str,
    version: str,
    condition: MatchOnly,
    purge: str = "false",
) -> Response:
    """One version. With `purge=true`, which is as for an adapter, also one that is deleted already."""
    forever, number = _flag(purge, "purge"), version_number(version)
    change.of(name, version, purge=forever)
    if number is None:
        number = (await exact_version(deps, tenant.id, name, version)).version
    await delete(deps, tenant.id, name, number, actor, condition=condition, purge=forever)
    answer = {"id": f"{name}@{number}", "object": "adapter.version", "deleted": True, "purged": forever}
    return json_response(answer)


@router.get("/{name}/versions/{version}/download")
async def download(
    deps: Deps, tenant: CurrentTenant, name: str, version: str, file: str | None = None
) -> Response:
    """A file as it was uploaded: the one named `file`, else the weights."""
    resolved = await deps.registry.resolve(tenant.id, name, version)
    manifest = await deps.registry.manifest(tenant.id, name, resolved.version)
    blob = manifest.weights if file is None else _blob(manifest, file)
    return await stored_file(deps.settings, deps.objects, blob.key, blob.name, blob.sha256)


async def delete(
    deps: Services,
    tenant_id: str,
    name: str,
    version: int | None,
    actor: str,
    *,
    condition: str = "",
    purge: bool = False,
) -> None:
    """Delete an adapter, or one version, in the registry and in the engine's caches.

    Raises NotFound, PreconditionFailed.
    """
    digests = await deps.registry.delete(
        tenant_id, name, version, actor=actor, condition=condition, purge=purge
    )
    for digest in digests:
        deps.engine.forget(digest)


async def uploaded_files(deps: Services, upload: Upload) -> AdapterUpload:
    """The adapter's files in an upload; a pickle is converted to safetensors.

    Raises InvalidAdapter if files are missing, InvalidField if the client's `sha256` differs.
    """
    upload.required("name")
    name = check_files(upload.files)
    file, expected = upload.files[name], upload.fields.get("sha256")
    if expected is not None and expected.lower() != file.sha256:
        raise InvalidField(
            f"sha256 is {shown(expected)}, but the {file.bytes} bytes of {name} have {file.sha256}.",
            param="sha256",
        )
    interface = upload.files[INTERFACE].path if INTERFACE in upload.files else None
    path = file.path
    if name in PICKLES:
        name, path = PICKLES[name], path.with_suffix(".safetensors")
        await run_sync(convert_pickle, file.path, path, limiter=deps.pickle_limiter)
    return AdapterUpload((CONFIG, upload.files[CONFIG].path), (name, path), interface)


def _flag(value: str, name: str) -> bool:
    """Raises InvalidField unless `value` is true or false."""
    if value.lower() not in ("true", "false"):
        raise InvalidField(f"{name} must be true or false, not {shown(value)}.", param=name)
    return value.lower() == "true"


def _blob(manifest: Manifest, name: str) -> Any:
    for blob in manifest.files:
        if blob.name == name:
            return blob
    raise NotFound(f"This version has no file {shown(name)}.", param="file")
