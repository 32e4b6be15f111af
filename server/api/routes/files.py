"""/v1/files: training data and results of jobs, as OpenAI's file objects."""

from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Query, Request, Response
from fastapi.responses import FileResponse
from pydantic import Field

from server.api.http.body_model import Body
from server.api.http.dependencies import CurrentChange, CurrentTenant, Deps, current_tenant
from server.api.http.error_responses import json_response
from server.api.http.json_body import validate
from server.api.http.list_page import check_limit, list_page
from server.api.http.multipart import Form, Upload, receive_form
from server.api.http.temp_files import stored_file, temp_folder
from server.api.schema.forms import form
from server.api.schema.objects import Deleted, FileList
from server.api.schema.objects import File as FileObject
from server.errors import Conflict, InvalidField, shown
from server.files.files import File, Purpose
from server.settings import Settings

router = APIRouter(prefix="/v1/files", dependencies=[Depends(current_tenant)])

MAX_PAGE = 10_000
EXPIRES_FIELDS = ("expires_after[anchor]", "expires_after[seconds]")
FORM = form(
    "file",
    {"purpose": "fine-tune"} | dict(zip(EXPIRES_FIELDS, ("created_at", "3600 to 2592000"), strict=True)),
    required=("purpose",),
)


class ExpiresAfter(Body):
    """When a file is deleted, as OpenAI has it: so many seconds after it was made."""

    anchor: Literal["created_at"]
    seconds: Annotated[int, Field(ge=3600, le=30 * 86_400)]


@router.post("", response_model=FileObject, openapi_extra=FORM)
async def upload_file(request: Request, deps: Deps, tenant: CurrentTenant, change: CurrentChange) -> Response:
    """multipart/form-data: `file`, and `purpose`, which must be fine-tune; optional: `expires_after[anchor]`
    and `expires_after[seconds]`.
    """
    deps.refuse_if_draining()
    await deps.files.check_quota(tenant.id, 0)
    form = Form(fields=("purpose", *EXPIRES_FIELDS), file="file", max_bytes=deps.settings.max_file_bytes)
    with temp_folder(deps.settings) as folder:
        upload = await receive_form(request, Path(folder), form, deps.settings.request_seconds)
        purpose = check_purpose(upload.required("purpose"))
        life = _life(upload, deps.settings)
        if not upload.files:
            raise InvalidField("file is required.", param="file", code="missing_field")
        ((name, stored),) = upload.files.items()
        if not stored.bytes:
            raise InvalidField(f"The file {shown(name)} is empty.", param="file")
        file = await deps.files.add(
            tenant.id, stored.path, name, stored.sha256, size=stored.bytes, purpose=purpose, life=life
        )
    change.of(file.id, bytes=file.bytes, sha256=file.sha256)
    return json_response(file_object(file))


@router.get("", response_model=FileList)
async def list_files(
    deps: Deps,
    tenant: CurrentTenant,
    after: str | None = None,
    limit: Annotated[int, Query()] = MAX_PAGE,
    order: Annotated[str, Query()] = "desc",
    purpose: str | None = None,
) -> Response:
    """By creation, the newest first unless `order` is asc; `after` is the last id of the previous page."""
    check_limit(limit, MAX_PAGE)
    if order not in ("asc", "desc"):
        raise InvalidField(f"order must be asc or desc, not {shown(order)}.", param="order")
    files = [file for file in await deps.files.list(tenant.id) if purpose in (None, file.purpose)]
    if order == "asc":
        files.reverse()
    if after is not None:
        ids = [file.id for file in files]
        if after not in ids:
            raise InvalidField(f"after is {shown(after)}, which is no file of this list.", param="after")
        files = files[ids.index(after) + 1 :]
    return list_page([file_object(file) for file in files[: limit + 1]], limit)


@router.get("/{file_id}", response_model=FileObject)
async def get_file(deps: Deps, tenant: CurrentTenant, file_id: str) -> Response:
    return json_response(file_object(await deps.files.get(tenant.id, file_id)))


@router.delete("/{file_id}", response_model=Deleted)
async def delete_file(deps: Deps, tenant: CurrentTenant, file_id: str) -> Response:
    """Raises Conflict while an unfinished job needs the file."""
    await deps.files.get(tenant.id, file_id)
    for job in await deps.jobs.unfinished(tenant.id):
        if file_id in (job.training_file, job.validation_file):
            raise Conflict(
                f"The job {job.id} needs the file {shown(file_id)}; cancel it first.", param="file_id"
            )
    await deps.files.delete(tenant.id, file_id)
    return json_response({"id": file_id, "object": "file", "deleted": True})


@router.get("/{file_id}/content", response_class=FileResponse)
async def get_content(deps: Deps, tenant: CurrentTenant, file_id: str) -> Response:
    file = await deps.files.get(tenant.id, file_id)
    return await stored_file(deps.settings, deps.objects, file.key, file.name, file.sha256)


def _life(upload: Upload, settings: Settings) -> int | None:
    """Seconds until the file expires, from the form's two fields; None: never. Raises InvalidField."""
    given: dict[str, Any] = {
        name: upload.fields[field]
        for name, field in zip(("anchor", "seconds"), EXPIRES_FIELDS, strict=True)
        if field in upload.fields
    }
    if not given:
        return None
    if (seconds := given.get("seconds", "")).isdecimal() and len(seconds) < 16:
        given["seconds"] = int(seconds)
    try:
        return validate(ExpiresAfter, given, settings).seconds
    except InvalidField as error:
        raise InvalidField(f"expires_after: {error.message}", param="expires_after") from None


def check_purpose(purpose: str) -> Purpose:
    """Raises InvalidField for any purpose but fine-tune."""
    allowed: Literal["fine-tune"] = "fine-tune"
    if purpose != allowed:
        raise InvalidField(
            f"purpose is {shown(purpose)}; this server keeps files for {allowed} only.", param="purpose"
        )
    return allowed


def file_object(file: File) -> dict[str, Any]:
    """OpenAI's `file`, with its SHA-256."""
    expires = {} if file.expires is None else {"expires_at": file.expires}
    return {
        "id": file.id,
        "object": "file",
        "bytes": file.bytes,
        "created_at": file.created,
        "filename": file.name,
        "purpose": file.purpose,
        "status": "processed",
        "sha256": file.sha256,  # ours
    } | expires
