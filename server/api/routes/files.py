"""/v1/files: training data and results of jobs, as OpenAI's file objects."""

from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Query, Request, Response

from server.api.http.dependencies import CurrentChange, CurrentTenant, Deps, current_tenant
from server.api.http.error_responses import json_response
from server.api.http.list_page import check_limit, list_page
from server.api.http.multipart import Form, receive_form
from server.api.http.temp_files import stored_file, temp_folder
from server.errors import Conflict, InvalidField, shown
from server.files.files import File, Purpose

router = APIRouter(prefix="/v1/files", dependencies=[Depends(current_tenant)])

MAX_PAGE = 10_000


@router.post("")
async def upload_file(request: Request, deps: Deps, tenant: CurrentTenant, change: CurrentChange) -> Response:
    """multipart/form-data: `file`, and `purpose`, which must be fine-tune."""
    deps.refuse_if_draining()
    await deps.files.check_quota(tenant.id, 0)
    form = Form(fields=("purpose",), file="file", max_bytes=deps.settings.max_file_bytes)
    with temp_folder(deps.settings) as folder:
        upload = await receive_form(request, Path(folder), form, deps.settings.request_seconds)
        purpose = check_purpose(upload.required("purpose"))
        if not upload.files:
            raise InvalidField("file is required.", param="file", code="missing_field")
        ((name, stored),) = upload.files.items()
        if not stored.bytes:
            raise InvalidField(f"The file {shown(name)} is empty.", param="file")
        file = await deps.files.add(
            tenant.id, stored.path, name, stored.sha256, size=stored.bytes, purpose=purpose
        )
    change.of(file.id, bytes=file.bytes, sha256=file.sha256)
    return json_response(file_object(file))


@router.get("")
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


@router.get("/{file_id}")
async def get_file(deps: Deps, tenant: CurrentTenant, file_id: str) -> Response:
    return json_response(file_object(await deps.files.get(tenant.id, file_id)))


@router.delete("/{file_id}")
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


@router.get("/{file_id}/content")
async def get_content(deps: Deps, tenant: CurrentTenant, file_id: str) -> Response:
    file = await deps.files.get(tenant.id, file_id)
    return await stored_file(deps.settings, deps.objects, file.key, file.name, file.sha256)


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
    return {
        "id": file.id,
        "object": "file",
        "bytes": file.bytes,
        "created_at": file.created,
        "expires_at": None,  # files stay until they are deleted
        "filename": file.name,
        "purpose": file.purpose,
        "status": "processed",
        "status_details": None,
        "sha256": file.sha256,  # ours
    }
