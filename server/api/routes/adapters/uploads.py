"""/v1/adapter_uploads: adapters whose files go directly to the object store, by presigned URLs.

    POST                  name and sizes of the files -> a URL for each, which takes a PUT until it expires
    POST {id}/complete    their digests -> the version, checked as for POST /v1/adapters
    GET {id}, POST {id}/cancel

The uploaded objects are not trusted: they are fetched, their size and SHA-256 verified, and stored again
under their content's name, so that a PUT to a URL that is still valid changes nothing.
"""

import asyncio
import hashlib
import logging
import time
from pathlib import Path
from typing import Annotated, Any

import msgspec
from anyio.to_thread import run_sync
from fastapi import APIRouter, Depends, Response
from pydantic import BeforeValidator, Field

from adapters_store.index.records import Version
from adapters_store.object_store.store import sha256_of
from adapters_store.registry.presigned_uploads import AnnouncedFile, PresignedUpload, new_id
from adapters_store.upload_records import CLAIM_SECONDS, LIFE_SECONDS, ended
from server.adapters.formats.ignored_files import ignored
from server.api.adapters.json_objects import uploaded_object
from server.api.adapters.publish import AdapterUpload, check_adapter_name, publish
from server.api.adapters.upload_form import check_files, kept
from server.api.http.body_model import Body, at_most_entries
from server.api.http.dependencies import Actor, CurrentChange, CurrentTenant, Deps, current_tenant
from server.api.http.error_responses import json_response
from server.api.http.json_body import json_body
from server.api.http.multipart import StoredFile, Upload
from server.api.http.temp_files import temp_folder
from server.api.routes.adapters.adapters import uploaded_files
from server.api.services import Services
from server.errors import (
    CorruptObject,
    InvalidField,
    InvalidRequest,
    NotFound,
    PolypeftError,
    TooLarge,
    shown,
)
from server.tenancy.tenants import Tenant

router = APIRouter(prefix="/v1/adapter_uploads", dependencies=[Depends(current_tenant)])

GRACE_SECONDS = 600  # for a PUT that began before its URL expired
DIGEST_CHARS = 64
MAX_FILES = 1024
log = logging.getLogger(__name__)


class FileBody(Body):
    name: Annotated[str, Field(min_length=1, max_length=255)]
    bytes: Annotated[int, Field(ge=1)]


class AdapterUploadBody(Body):
    name: str
    files: Annotated[list[FileBody], BeforeValidator(at_most_entries(MAX_FILES)), Field(min_length=1)]
    create_only: bool = False
    allow_noop: bool = False


class DigestsBody(Body):
    # by the files' names
    sha256: Annotated[dict[str, str], BeforeValidator(at_most_entries(MAX_FILES)), Field(min_length=1)]


@router.post("", status_code=201)
async def create_upload(
    deps: Deps,
    tenant: CurrentTenant,
    change: CurrentChange,
    body: Annotated[AdapterUploadBody, Depends(json_body(AdapterUploadBody))],
) -> Response:
    """The answer leaves out files that an adapter does not need; only those in it are to be sent."""
    deps.refuse_if_draining()
    if not deps.objects.remote:
        raise InvalidRequest(
            "This server's store takes no direct uploads; send the files to POST /v1/adapters.",
            code="direct_uploads_off",
        )
    check_adapter_name(deps, body.name)
    files = _needed_files(deps, body)
    size = sum(file.bytes for file in files)
    await deps.registry.next_version(tenant.id, body.name, size)  # checks the quota
    upload = PresignedUpload(
        id=new_id(),
        tenant=tenant.id,
        name=body.name,
        files=files,
        create_only=body.create_only,
        allow_noop=body.allow_noop,
        created=int(time.time()),
    )
    change.of(upload.id, name=upload.name, bytes=size)
    await deps.files.scheduled_deletes.add([upload.prefix], LIFE_SECONDS + GRACE_SECONDS)
    answer = await _object(deps, await deps.presigned_uploads.create(upload))
    return json_response(answer | {"ignored": ignored(file.name for file in body.files)}, 201)


@router.get("/{upload_id}")
async def get_upload(deps: Deps, tenant: CurrentTenant, upload_id: str) -> Response:
    """While the upload is pending, with newly signed URLs."""
    return json_response(await _object(deps, await deps.presigned_uploads.get(tenant.id, upload_id)))


@router.post("/{upload_id}/cancel")
async def cancel_upload(deps: Deps, tenant: CurrentTenant, upload_id: str) -> Response:
    upload = await deps.presigned_uploads.get(tenant.id, upload_id)
    await deps.presigned_uploads.cancel(upload)
    await _clear(deps, upload)
    return json_response(await _object(deps, await deps.presigned_uploads.get(tenant.id, upload_id)))


@router.post("/{upload_id}/complete", status_code=201)
async def complete_upload(
    deps: Deps,
    tenant: CurrentTenant,
    actor: Actor,
    change: CurrentChange,
    upload_id: str,
    body: Annotated[DigestsBody, Depends(json_body(DigestsBody))],
) -> Response:
    """Idempotent. After a refusal the files may be PUT again and completed again."""
    deps.refuse_if_draining()
    upload = await deps.presigned_uploads.get(tenant.id, upload_id)
    digests = _digests(upload, body)
    digests_hash = hashlib.sha256(msgspec.json.encode(digests)).hexdigest()
    if upload.status == "pending":
        version = await _complete(deps, tenant, actor, upload, digests, digests_hash)
    elif upload.status == "completed" and upload.asked == digests_hash:
        version = await deps.registry.resolve(tenant.id, upload.name, str(upload.version))
    else:
        raise ended(upload.id, upload.status)
    change.of(upload_id, version=f"{version.name}@{version.version}", digest=version.digest)
    return json_response(uploaded_object(version), 201, {"Location": f"/v1/adapters/{version.name}"})


async def _complete(
    deps: Services,
    tenant: Tenant,
    actor: str,
    upload: PresignedUpload,
    digests: list[str],
    digests_hash: str,
) -> Version:
    """Publish the files under a claim on the upload, which is released if that fails."""
    token = new_id()
    first = await deps.registry.next_version(tenant.id, upload.name)
    upload = await deps.presigned_uploads.claim(upload, token, first)
    renewing = asyncio.create_task(_renew_claim(deps, upload, token))
    try:
        with temp_folder(deps.settings) as folder:
            fetched = await _fetch(deps, upload, digests, Path(folder))
            files = await uploaded_files(deps, fetched)
            version = await _published_before(deps, upload, files)
            version = version or await publish(
                deps,
                tenant,
                upload.name,
                files,
                create_only=upload.create_only,
                allow_noop=upload.allow_noop,
                actor=actor,
            )
        await deps.presigned_uploads.complete(upload, version.version, digests_hash)
    except BaseException:
        await deps.presigned_uploads.release(upload, token)
        raise
    finally:
        renewing.cancel()
    await _clear(deps, upload)
    return version


async def _renew_claim(deps: Services, upload: PresignedUpload, token: str) -> None:
    """Renew the claim until cancelled. If it is lost, at worst the version is published twice."""
    while True:
        await asyncio.sleep(CLAIM_SECONDS / 3)
        try:
            await deps.presigned_uploads.claim(upload, token, upload.first)
        except PolypeftError as error:
            log.warning("The claim on %s was not renewed: %s", upload.id, error)


async def _fetch(deps: Services, upload: PresignedUpload, digests: list[str], folder: Path) -> Upload:
    """Download the files into `folder` and verify them. Raises InvalidField if one is missing or differs."""
    for number, file in enumerate(upload.files):
        try:
            size = (await deps.objects.head(upload.key(number))).bytes
        except NotFound:
            raise InvalidField(f"The file {shown(file.name)} has not arrived.", param="files") from None
        if size != file.bytes:  # before a byte of it is fetched
            raise InvalidField(
                f"The file {shown(file.name)} has {size} bytes, but was announced with {file.bytes}.",
                param="files",
            )
    fetched = Upload(fields={"name": upload.name})
    for number, (file, digest) in enumerate(zip(upload.files, digests, strict=True)):
        path = folder / f"{number}.part"
        try:
            await deps.objects.download(upload.key(number), path, digest)
        except CorruptObject:
            raise InvalidField(
                f"sha256 of {shown(file.name)} is {shown(digest)}, but its bytes have another.",
                param="sha256",
            ) from None
        except NotFound:
            raise InvalidField(f"The file {shown(file.name)} has not arrived.", param="files") from None
        fetched.files[file.name] = StoredFile(path, file.bytes, digest)
    return fetched


async def _published_before(deps: Services, upload: PresignedUpload, files: AdapterUpload) -> Version | None:
    """The version of these files that an earlier claimant published before it crashed, if there is one.

    Its number is at least `upload.first`, the next version when the first claim was made.
    """
    try:
        adapter = await deps.registry.get(upload.tenant, upload.name)
    except NotFound:
        return None
    digests: set[str] = set()
    for version in (version for version in adapter.versions if version.version >= upload.first):
        manifest = await deps.registry.manifest(upload.tenant, upload.name, version.version)
        digests = digests or {await run_sync(sha256_of, path) for _, path in (files.config, files.weights)}
        if digests == {blob.sha256 for blob in manifest.files}:
            return version
    return None


async def _clear(deps: Services, upload: PresignedUpload) -> None:
    """Delete the uploaded objects now, and again when the URLs have expired: until then a PUT is possible."""
    valid_seconds = max(0, upload.expires - upload.now)
    await deps.files.scheduled_deletes.discard(upload.prefix, valid_seconds + GRACE_SECONDS)


def _needed_files(deps: Services, body: AdapterUploadBody) -> list[AnnouncedFile]:
    """The files that are needed. Raises InvalidField, InvalidAdapter, TooLarge, UnsupportedMedia."""
    files = [AnnouncedFile(file.name, file.bytes) for file in body.files if kept(file.name)]
    names = [file.name for file in files]
    if len(set(names)) < len(names):
        raise InvalidField("files names a file twice.", param="files")
    if len(files) > deps.settings.max_upload_files:
        raise InvalidField(
            f"An upload must have at most {deps.settings.max_upload_files} files.", param="files"
        )
    if sum(file.bytes for file in files) > deps.settings.max_upload_bytes:
        raise TooLarge(f"The upload is larger than {deps.settings.max_upload_bytes} bytes.", param="files")
    check_files(names)
    return files


def _digests(upload: PresignedUpload, body: DigestsBody) -> list[str]:
    """The digests in the order of the upload's files, in lower case. Raises InvalidField."""
    names = [file.name for file in upload.files]
    if body.sha256.keys() != set(names):
        raise InvalidField(f"sha256 must have one digest for each of {', '.join(names)}.", param="sha256")
    digests = [body.sha256[name].lower() for name in names]
    for digest in digests:
        if len(digest) != DIGEST_CHARS or set(digest) - set("0123456789abcdef"):
            raise InvalidField(
                f"sha256 {shown(digest)} must have {DIGEST_CHARS} hexadecimal digits.", param="sha256"
            )
    return digests


async def _object(deps: Services, upload: PresignedUpload) -> dict[str, Any]:
    files: list[dict[str, Any]] = []
    for number, file in enumerate(upload.files):
        announced: dict[str, Any] = {"name": file.name, "bytes": file.bytes}
        if upload.status == "pending":
            seconds = upload.expires - upload.now
            announced |= {"method": "PUT", "url": await deps.objects.sign_put(upload.key(number), seconds)}
        files.append(announced)
    return {
        "id": upload.id,
        "object": "adapter.upload",
        "name": upload.name,
        "status": upload.status,
        "created_at": upload.created,
        "expires_at": upload.expires,
        "version": upload.version or None,
        "files": files,
    }
