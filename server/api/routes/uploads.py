"""/v1/uploads: files uploaded in parts, as OpenAI's upload objects."""

from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request, Response
from pydantic import BeforeValidator, Field

from server.api.http.body_model import Body, at_most_entries
from server.api.http.dependencies import CurrentChange, CurrentTenant, Deps, current_tenant
from server.api.http.error_responses import json_response
from server.api.http.json_body import json_body
from server.api.http.multipart import Form, receive_form
from server.api.http.temp_files import temp_folder
from server.api.routes.files import ExpiresAfter, check_purpose, file_object
from server.api.schema.forms import form
from server.api.schema.objects import Part
from server.api.schema.objects import Upload as UploadObject
from server.errors import InvalidField
from server.files.files import File
from server.files.uploads import MAX_PARTS, Upload

router = APIRouter(prefix="/v1/uploads", dependencies=[Depends(current_tenant)])

MAX_PART_BYTES = 64 << 20


class UploadBody(Body):
    bytes: Annotated[int, Field(ge=1)]
    filename: str
    mime_type: Annotated[str, Field(max_length=256)]  # accepted and ignored
    purpose: str
    expires_after: ExpiresAfter | None = None


class PartsBody(Body):
    part_ids: Annotated[list[str], BeforeValidator(at_most_entries(MAX_PARTS)), Field(min_length=1)]
    md5: Annotated[str, Field(min_length=32, max_length=32)] | None = None


@router.post("", response_model=UploadObject)
async def create_upload(
    deps: Deps,
    tenant: CurrentTenant,
    change: CurrentChange,
    body: Annotated[UploadBody, Depends(json_body(UploadBody))],
) -> Response:
    deps.refuse_if_draining()
    purpose = check_purpose(body.purpose)
    life = None if body.expires_after is None else body.expires_after.seconds
    upload = await deps.uploads.create(tenant.id, body.filename, body.bytes, purpose, life)
    change.of(upload.id, bytes=upload.bytes)
    return json_response(upload_object(upload))


@router.post("/{upload_id}/parts", response_model=Part, openapi_extra=form("data"))
async def add_part(request: Request, deps: Deps, tenant: CurrentTenant, upload_id: str) -> Response:
    """multipart/form-data: `data`."""
    deps.refuse_if_draining()
    await deps.uploads.get(tenant.id, upload_id)  # before its bytes are read
    form = Form(fields=(), file="data", max_bytes=min(MAX_PART_BYTES, deps.settings.max_file_bytes))
    with temp_folder(deps.settings) as folder:
        upload = await receive_form(request, Path(folder), form, deps.settings.request_seconds)
        data = next(iter(upload.files.values()), None)
        if data is None or not data.bytes:
            raise InvalidField("data is required, and holds at least one byte.", param="data")
        part = await deps.uploads.add_part(tenant.id, upload_id, data.path, data.bytes, data.sha256)
    return json_response(
        {"id": part.id, "object": "upload.part", "created_at": part.created, "upload_id": upload_id}
    )


@router.post("/{upload_id}/complete", response_model=UploadObject)
async def complete_upload(
    deps: Deps,
    tenant: CurrentTenant,
    change: CurrentChange,
    upload_id: str,
    body: Annotated[PartsBody, Depends(json_body(PartsBody))],
) -> Response:
    """`part_ids` in the order of the file. Idempotent."""
    with temp_folder(deps.settings) as folder:
        upload, file = await deps.uploads.complete(
            tenant.id, upload_id, body.part_ids, body.md5, Path(folder)
        )
    change.of(upload_id, file=file.id)
    return json_response(upload_object(upload, file))


@router.post("/{upload_id}/cancel", response_model=UploadObject)
async def cancel_upload(deps: Deps, tenant: CurrentTenant, upload_id: str) -> Response:
    return json_response(upload_object(await deps.uploads.cancel(tenant.id, upload_id)))


def upload_object(upload: Upload, file: File | None = None) -> dict[str, Any]:
    """OpenAI's `upload`, with the `file` that it has become."""
    return {
        "id": upload.id,
        "object": "upload",
        "bytes": upload.bytes,
        "created_at": upload.created,
        "expires_at": upload.expires,
        "filename": upload.name,
        "purpose": upload.purpose,
        "status": upload.status,
        "file": file and file_object(file),
    }
