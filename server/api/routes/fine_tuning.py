"""/v1/fine_tuning/jobs: OpenAI's jobs, with a `peft` block of ours for the five methods."""

import hashlib
import time
from typing import Annotated, Any, ClassVar

import msgspec
from fastapi import APIRouter, Depends, Query, Request, Response
from pydantic import Field

from server.api.adapters.publish import check_adapter_name
from server.api.fine_tuning import dataset_check as job_data
from server.api.fine_tuning.event_stream import follow
from server.api.fine_tuning.json_objects import (
    CHECKPOINT,
    EVENT,
    checkpoint_object,
    event_object,
    job_object,
    number_in,
)
from server.api.http.body_model import Body, Metadata
from server.api.http.dependencies import CurrentTenant, Deps, current_tenant
from server.api.http.error_responses import json_response
from server.api.http.json_body import json_body
from server.api.http.list_page import check_limit, list_page
from server.api.http.streaming import open_stream
from server.api.services import Services
from server.errors import InvalidField, shown
from server.finetune.jobs.job import FixedPart, Job, new_event
from server.finetune.jobs.jobs import IdempotencyKey, new_job_id
from server.finetune.recipe import Recipe, RecipeLimits, parse_recipe
from server.tenancy.tenants import Tenant

router = APIRouter(prefix="/v1/fine_tuning/jobs", dependencies=[Depends(current_tenant)])

MAX_PAGE = 100
MAX_IDEMPOTENCY_KEY = 255

FileId = Annotated[str, Field(min_length=1, max_length=64)]


class JobBody(Body):
    refused: ClassVar[dict[str, str]] = {"integrations": "this server sends nothing to other services"}

    model: Annotated[str, Field(min_length=1, max_length=512)]
    training_file: FileId
    validation_file: FileId | None = None
    hyperparameters: dict[str, Any] | None = None
    method: dict[str, Any] | None = None
    peft: dict[str, Any] | None = None
    suffix: str | None = None  # the adapter's name; a known one gets a version more
    seed: int | None = None
    metadata: Metadata | None = None


@router.post("")
async def create_job(
    request: Request,
    deps: Deps,
    tenant: CurrentTenant,
    body: Annotated[JobBody, Depends(json_body(JobBody))],
) -> Response:
    """Everything is checked before anything is queued: fields, files, every line of the data.

    With an `Idempotency-Key` known from the last 24 hours, the job that it made then.
    """
    deps.refuse_if_draining()
    same = _same(request, body)
    if same and (job := await deps.jobs.find_same(tenant.id, same)):
        return _created(job)
    if body.model != deps.base.id:
        raise InvalidField(
            f"model must be the base {shown(deps.base.id)}, not {shown(body.model)}.", param="model"
        )
    if body.suffix is not None:
        check_adapter_name(deps, body.suffix, "suffix")
    recipe = _recipe(deps, body, body.seed, examples=1)  # what is wrong with the fields needs no file
    data = await job_data.find(deps, tenant.id, body.training_file, body.validation_file)
    async with deps.dataset_check_lock.acquire(tenant.id, deps.settings.request_seconds):
        if same and (job := await deps.jobs.find_same(tenant.id, same)):  # it came twice at a time
            return _created(job)
        reports = await job_data.check(deps, data, recipe.max_tokens)
    recipe = _recipe(deps, body, recipe.seed, reports["training_file"].examples)
    figures = {param: job_data.dataset_stats(report) for param, report in reports.items()}
    events = [_data_event(param, found) for param, found in figures.items()]
    fixed = _fixed(deps, tenant, body, recipe, figures)
    return _created(await deps.jobs.create(fixed, same, *events))


@router.get("")
async def list_jobs(
    request: Request,
    deps: Deps,
    tenant: CurrentTenant,
    after: str | None = None,
    limit: Annotated[int, Query()] = 20,
) -> Response:
    """The newest first; `metadata[k]=v`, repeated, leaves those out that have it otherwise."""
    check_limit(limit, MAX_PAGE)
    wanted = _metadata_filter(request)
    found: list[Job] = []
    while len(found) <= limit and (page := await deps.jobs.page(tenant.id, after, MAX_PAGE)):
        found += [job for job in page if wanted is None or _matches(job, wanted)]
        after = page[-1].id
    return list_page([job_object(job) for job in found], limit)


@router.get("/{job_id}")
async def get_job(deps: Deps, tenant: CurrentTenant, job_id: str) -> Response:
    return json_response(job_object(await deps.jobs.get(tenant.id, job_id)))


@router.post("/{job_id}/cancel")
async def cancel_job(deps: Deps, tenant: CurrentTenant, job_id: str) -> Response:
    """The job is cancelled when the answer comes, and nothing of it will be published."""
    return json_response(job_object(await deps.jobs.cancel(tenant.id, job_id)))


@router.post("/{job_id}/pause")
async def pause_job(deps: Deps, tenant: CurrentTenant, job_id: str) -> Response:
    """A running job pauses within seconds, once its worker has saved; `paused` says when."""
    return json_response(job_object(await deps.jobs.pause(tenant.id, job_id)))


@router.post("/{job_id}/resume")
async def resume_job(deps: Deps, tenant: CurrentTenant, job_id: str) -> Response:
    return json_response(job_object(await deps.jobs.resume(tenant.id, job_id)))


@router.get("/{job_id}/events")
async def list_events(
    request: Request,
    deps: Deps,
    tenant: CurrentTenant,
    job_id: str,
    after: str | None = None,
    limit: Annotated[int, Query()] = 20,
    stream: bool = False,
) -> Response:
    """The newest first. With `stream=true` all of them, the oldest first, and those to come, until the job is
    over; `Last-Event-ID` goes on after the event it names.
    """
    job = await deps.jobs.get(tenant.id, job_id)
    if stream:
        last = request.headers.get("last-event-id", "")
        seen = number_in(last, EVENT, job.id, "Last-Event-ID") if last else 0
        return await open_stream(request, follow(deps, job.id, seen))
    check_limit(limit, MAX_PAGE)
    before = None if after is None else number_in(after, EVENT, job.id, "after")
    found = await deps.jobs.events(job.id, before=before, limit=limit + 1, newest=True)
    return list_page([event_object(job.id, event) for event in found], limit)


@router.get("/{job_id}/checkpoints")
async def list_checkpoints(
    deps: Deps,
    tenant: CurrentTenant,
    job_id: str,
    after: str | None = None,
    limit: Annotated[int, Query()] = 10,
) -> Response:
    """The newest first."""
    check_limit(limit, MAX_PAGE)
    job = await deps.jobs.get(tenant.id, job_id)
    found = await deps.jobs.checkpoints(job.id)
    if after is not None:
        step = number_in(after, CHECKPOINT, job.id, "after")
        found = [checkpoint for checkpoint in found if checkpoint.step < step]
    return list_page([checkpoint_object(job, checkpoint) for checkpoint in found], limit)


def _created(job: Job) -> Response:
    return json_response(job_object(job), headers={"Location": f"{router.prefix}/{job.id}"})


def _same(request: Request, body: JobBody) -> IdempotencyKey | None:
    key = request.headers.get("idempotency-key")
    if key is None:
        return None
    if not 0 < len(key) <= MAX_IDEMPOTENCY_KEY:
        raise InvalidField(
            f"Idempotency-Key must have 1 to {MAX_IDEMPOTENCY_KEY} characters.", param="Idempotency-Key"
        )
    content = msgspec.json.encode(body.model_dump(), order="deterministic")
    return IdempotencyKey(key, hashlib.sha256(content).hexdigest())


def _recipe(deps: Services, body: JobBody, seed: int | None, examples: int) -> Recipe:
    settings = deps.settings
    limits = RecipeLimits(
        lora_rank=settings.max_lora_rank,
        steps=settings.max_training_steps,
        max_tokens=settings.max_training_context,
        seconds=settings.max_training_seconds,
    )
    return parse_recipe(
        body.method, body.hyperparameters, seed, deps.base, examples, peft=body.peft, limits=limits
    )


def _fixed(
    deps: Services, tenant: Tenant, body: JobBody, recipe: Recipe, figures: dict[str, dict[str, int]]
) -> FixedPart:
    id_ = new_job_id()
    return FixedPart(
        id=id_,
        tenant=tenant.id,
        created=time.time(),
        model=deps.base.id,
        base_digest=deps.base.digest,
        name=body.suffix or f"ft-{id_[-8:]}",
        training_file=body.training_file,
        validation_file=body.validation_file,
        recipe=recipe,
        suffix=body.suffix,
        seed=recipe.seed,
        metadata=body.metadata,
        data=figures,
    )


def _data_event(param: str, found: dict[str, int]) -> bytes:
    cut = f"; {found['truncated']} are longer than a training example may be, and lose their beginning"
    return new_event(
        "warn" if found["truncated"] or found["dropped"] else "info",
        f"{param} has {found['examples']} examples of {found['tokens']} tokens, {found['trained_tokens']} of "
        f"which are learned{cut if found['truncated'] else ''}.",
        data=dict(found),
    )


def _metadata_filter(request: Request) -> dict[str, str] | None:
    """{} means: those without any."""
    query = request.query_params
    if query.get("metadata") == "null":
        return {}
    wanted = {
        name.removeprefix("metadata[").removesuffix("]"): value
        for name, value in query.items()
        if name.startswith("metadata[") and name.endswith("]")
    }
    return wanted or None


def _matches(job: Job, wanted: dict[str, str]) -> bool:
    if not wanted:
        return not job.metadata
    return job.metadata is not None and wanted.items() <= job.metadata.items()
