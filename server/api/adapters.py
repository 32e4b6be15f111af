"""/v1/adapters: a tenant's own adapters and their versions."""

import asyncio
from pathlib import Path
from typing import Annotated, Any

from anyio.to_thread import run_sync
from fastapi import APIRouter, Depends, Query, Request, Response
from pydantic import Field

from adapters_store.index import Adapter, Version
from adapters_store.manifest import Manifest
from server.adapters.formats.convert import PICKLES, convert_pickle
from server.api.adapter_form import CONFIG, INTERFACE, adapter_form, check_files
from server.api.body import json_body
from server.api.deps import CurrentTenant, Parts, current_tenant
from server.api.errors import json_response
from server.api.incoming import incoming, stored_file
from server.api.multipart import Upload, receive_form
from server.api.publish import Files, publish
from server.api.schemas import Body
from server.api.services import Services
from server.errors import InvalidField, NotFound, shown

router = APIRouter(prefix="/v1/adapters", dependencies=[Depends(current_tenant)])

PAGE = 100
EVALUATIONS = 20


class AliasBody(Body):
    alias: str
    version: Annotated[int, Field(ge=1, le=99_999_999)]


@router.post("")
async def upload_adapter(request: Request, parts: Parts, tenant: CurrentTenant) -> Response:
    """multipart/form-data: `name`, `files` (repeated), and perhaps `sha256` of the weights file, or
    `allow_noop=true` to let in an adapter that changes nothing.

    `If-None-Match: *` creates and never adds a version.
    """
    parts.refuse_if_draining()
    form, seconds = adapter_form(parts.settings), parts.settings.request_seconds
    with incoming(parts.settings) as folder:
        upload = await receive_form(request, Path(folder), form, seconds)
        create_only = request.headers.get("if-none-match") == "*"
        files, noop = await uploaded_files(parts, upload), _flag(upload, "allow_noop")
        version = await publish(
            parts, tenant, upload.fields["name"], files, create_only=create_only, allow_noop=noop
        )
    headers = {"Location": f"/v1/adapters/{version.name}"}
    return json_response(version_object(version) | {"object": "adapter", "name": version.name}, 201, headers)


@router.get("")
async def list_adapters(
    parts: Parts, tenant: CurrentTenant, after: str | None = None, limit: Annotated[int, Query()] = PAGE
) -> Response:
    """By name, `limit` (1 to 100) at a time; `after` is the last name of the page before."""
    if not 1 <= limit <= PAGE:
        raise InvalidField(f"limit must be 1 to {PAGE}, not {shown(limit)}.", param="limit")
    found = await parts.registry.list(tenant.id, after, limit + 1)
    page = found[:limit]
    return json_response(
        {
            "object": "list",
            "data": [_adapter_object(adapter) for adapter in page],
            "first_id": page[0].name if page else None,
            "last_id": page[-1].name if page else None,
            "has_more": len(found) > limit,
        }
    )


@router.get("/{name}")
async def get_adapter(parts: Parts, tenant: CurrentTenant, name: str) -> Response:
    """Adds to the list's facts how versions that were trained here compare with the base, the newest few."""
    adapter = await parts.registry.get(tenant.id, name)
    trained = [version for version in reversed(adapter.versions) if version.evaluated][:EVALUATIONS]
    manifests = [parts.registry.manifest(tenant.id, name, version.version) for version in trained]
    found = {manifest.version: manifest.evaluation for manifest in await asyncio.gather(*manifests)}
    answer = _adapter_object(adapter) | {"evaluation": found.get(adapter.latest.version)}
    for version in answer["versions"]:
        version["evaluation"] = found.get(version["version"])
    return json_response(answer)


@router.delete("/{name}")
async def delete_adapter(parts: Parts, tenant: CurrentTenant, name: str) -> Response:
    """All its versions and aliases. Running requests end as they would."""
    await delete(parts, tenant.id, name, None)
    return json_response({"id": name, "object": "adapter", "deleted": True})


@router.get("/{name}/versions/{version}")
async def get_version(parts: Parts, tenant: CurrentTenant, name: str, version: str) -> Response:
    """Adds to the list's facts what the engine found: parameters, bytes on the device, ..."""
    found = await parts.registry.resolve(tenant.id, name, version)
    manifest = await parts.registry.manifest(tenant.id, name, found.version)
    more = {"facts": manifest.facts, "config": manifest.config, "evaluation": manifest.evaluation}
    return json_response(version_object(found) | more)


@router.delete("/{name}/versions/{version}")
async def delete_version(parts: Parts, tenant: CurrentTenant, name: str, version: str) -> Response:
    found = await parts.registry.resolve(tenant.id, name, version)
    await delete(parts, tenant.id, name, found.version)
    return json_response({"id": f"{name}@{found.version}", "object": "adapter.version", "deleted": True})


@router.post("/{name}/aliases")
async def set_alias(
    parts: Parts,
    tenant: CurrentTenant,
    name: str,
    body: Annotated[AliasBody, Depends(json_body(AliasBody))],
) -> Response:
    """Point an alias at a version, wherever it pointed before."""
    await parts.registry.set_alias(tenant.id, name, body.alias, body.version)
    return json_response(_adapter_object(await parts.registry.get(tenant.id, name)))


@router.get("/{name}/versions/{version}/download")
async def download(
    parts: Parts, tenant: CurrentTenant, name: str, version: str, file: str | None = None
) -> Response:
    """One file as it was uploaded: the weights, or the one `file` names."""
    found = await parts.registry.resolve(tenant.id, name, version)
    manifest = await parts.registry.manifest(tenant.id, name, found.version)
    blob = manifest.weights if file is None else _blob(manifest, file)
    return await stored_file(parts.settings, parts.objects, blob.key, blob.name, blob.sha256)


async def delete(parts: Services, tenant_id: str, name: str, version: int | None) -> None:
    """Forget it here and in the engine. Raises NotFound."""
    for digest in await parts.registry.delete(tenant_id, name, version):
        parts.engine.forget(digest)


async def uploaded_files(parts: Services, upload: Upload) -> Files:
    """The upload's files, if it holds them and they are what the client meant to send."""
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
        await run_sync(convert_pickle, file.path, path, limiter=parts.converting)
    return Files((CONFIG, upload.files[CONFIG].path), (name, path), interface)


def _flag(upload: Upload, name: str) -> bool:
    value = upload.fields.get(name, "false").lower()
    if value not in ("true", "false"):
        raise InvalidField(f"{name} must be true or false, not {shown(value)}.", param=name)
    return value == "true"


def _blob(manifest: Manifest, name: str) -> Any:
    for blob in manifest.files:
        if blob.name == name:
            return blob
    raise NotFound(f"This version has no file {shown(name)}.", param="file")


def version_object(version: Version) -> dict[str, Any]:
    return {
        "object": "adapter.version",
        "id": f"{version.name}@{version.version}",
        "version": version.version,
        "method": version.method,
        "rank": version.rank,
        "base": version.base,
        "bytes": version.bytes,
        "sha256": version.sha256,
        "digest": version.digest,
        "created": version.created,
    }


def _adapter_object(adapter: Adapter) -> dict[str, Any]:
    latest = adapter.latest
    return version_object(latest) | {
        "object": "adapter",
        "id": adapter.name,
        "name": adapter.name,
        "aliases": adapter.aliases,
        "versions": [version_object(version) for version in adapter.versions],
    }
