"""/v1/fine_tuning/jobs: OpenAI's jobs, with an additional block `peft` for the method's parameters."""

import hashlib
import time
from typing import Annotated, Any

import msgspec
from fastapi import APIRouter, Depends, Query, Request, Response
from pydantic import Field, field_validator

from adapters_store.names import adapter_name
from server.api.adapters.publish import check_adapter_name
from server.api.fine_tuning import dataset_check
from server.api.fine_tuning.event_stream import follow
from server.api.fine_tuning.json_objects import (
    CHECKPOINT_PREFIX,
    EVENT_PREFIX,
    checkpoint_object,
    event_object,
    job_object,
    number_in,
)
from server.api.http.audited import Change
from server.api.http.body_model import Body, Metadata
from server.api.http.dependencies import Actor, CurrentChange, CurrentTenant, Deps, current_tenant
from server.api.http.error_responses import json_response
from server.api.http.json_body import json_body
from server.api.http.list_page import check_limit, list_page
from server.api.http.streaming import open_stream
from server.api.schema.objects import STREAM, CheckpointList, EventList, JobList
from server.api.schema.objects import Job as JobObject
from server.api.services import Services
from server.errors import InvalidField, shown
from server.finetune.jobs.job import FixedPart, Job, new_event
from server.finetune.jobs.jobs import IdempotencyKey, new_job_id
from server.finetune.recipe import Recipe, RecipeLimits, parse_recipe
from server.tenancy.tenants import Tenant

router = APIRouter(prefix="/v1/fine_tuning/jobs", dependencies=[Depends(current_tenant)])

MAX_PAGE = 100
MAX_IDEMPOTENCY_KEY_CHARS = 255

FileId = Annotated[str, Field(min_length=1, max_length=64)]


class JobBody(Body):
    """A new job. server/finetune/recipe.py parses `method`, `hyperparameters` and `peft`."""

    model: Annotated[str, Field(min_length=1, max_length=512)]
    training_file: FileId
    validation_file: FileId | None = None
    hyperparameters: dict[str, Any] | None = None
    method: dict[str, Any] | None = None
    peft: dict[str, Any] | None = None
    # of which the adapter's name is made; an existing adapter gets a new version
    suffix: Annotated[str, Field(min_length=1, max_length=64)] | None = None
    integrations: list[Any] | None = None
    seed: int | None = None
    metadata: Metadata | None = None

    @field_validator("integrations")
    @classmethod
    def _integrations(cls, value: list[Any]) -> list[Any]:
        if value:
            raise InvalidField(
                "integrations is not supported: this server sends nothing to other services.",
                param="integrations",
            )
        return value


@router.post("", response_model=JobObject)
async def create_job(
    request: Request,
    deps: Deps,
    tenant: CurrentTenant,
    actor: Actor,
    change: CurrentChange,
    body: Annotated[JobBody, Depends(json_body(JobBody))],
) -> Response:
    """Checks fields, files and every line of the data before the job is queued.

    With an `Idempotency-Key` of the last 24 hours it answers with the job that was made then.
    """
    deps.refuse_if_draining()
    idempotency = _idempotency(request, body)
    if idempotency and (job := await deps.jobs.find_same(tenant.id, idempotency)):
        return _created(job, change)
    if body.model != deps.base.id:
        raise InvalidField(
            f"model must be the base {shown(deps.base.id)}, not {shown(body.model)}.", param="model"
        )
    name = None if body.suffix is None else check_adapter_name(deps, adapter_name(body.suffix), "suffix")
    recipe = _recipe(deps, body, body.seed, examples=1)  # to check the fields before the files
    data = await dataset_check.find(deps, tenant.id, body.training_file, body.validation_file)
    async with deps.dataset_check_lock.acquire(tenant.id, deps.settings.request_seconds):
        # the same request may have come twice at once
        if idempotency and (job := await deps.jobs.find_same(tenant.id, idempotency)):
            return _created(job, change)
        reports = await dataset_check.check(deps, data, recipe.max_tokens)
    recipe = _recipe(deps, body, recipe.seed, reports["training_file"].examples)
    stats = {param: dataset_check.dataset_stats(report) for param, report in reports.items()}
    events = [_data_event(param, counts) for param, counts in stats.items()]
    fixed = _fixed_part(deps, tenant, actor, body, name, recipe, stats)
    return _created(await deps.jobs.create(fixed, idempotency, *events), change)


@router.get("", response_model=JobList)
async def list_jobs(
    request: Request,
    deps: Deps,
    tenant: CurrentTenant,
    after: str | None = None,
    limit: Annotated[int, Query()] = 20,
) -> Response:
    """The newest first. `metadata[k]=v`, repeated, lists only jobs with these values."""
    check_limit(limit, MAX_PAGE)
    metadata = _metadata_filter(request)
    jobs: list[Job] = []
    while len(jobs) <= limit and (page := await deps.jobs.page(tenant.id, after, MAX_PAGE)):
        jobs += [job for job in page if metadata is None or _matches(job, metadata)]
        after = page[-1].id
    return list_page([job_object(job) for job in jobs], limit)


@router.get("/{job_id}", response_model=JobObject)
async def get_job(deps: Deps, tenant: CurrentTenant, job_id: str) -> Response:
    return json_response(job_object(await deps.jobs.get(tenant.id, job_id)))


@router.post("/{job_id}/cancel", response_model=JobObject)
async def cancel_job(deps: Deps, tenant: CurrentTenant, job_id: str) -> Response:
    """When the answer comes, the job is cancelled: it will publish nothing."""
    return json_response(job_object(await deps.jobs.cancel(tenant.id, job_id)))


@router.post("/{job_id}/pause", response_model=JobObject)
async def pause_job(deps: Deps, tenant: CurrentTenant, job_id: str) -> Response:
    """A running job pauses within seconds, once its worker has saved a checkpoint; then `paused` is true."""
    return json_response(job_object(await deps.jobs.pause(tenant.id, job_id)))


@router.post("/{job_id}/resume", response_model=JobObject)
async def resume_job(deps: Deps, tenant: CurrentTenant, job_id: str) -> Response:
    return json_response(job_object(await deps.jobs.resume(tenant.id, job_id)))


@router.get("/{job_id}/events", response_model=EventList, responses=STREAM)
async def list_events(
    request: Request,
    deps: Deps,
    tenant: CurrentTenant,
    job_id: str,
    after: str | None = None,
    limit: Annotated[int, Query()] = 20,
    stream: bool = False,
) -> Response:
    """The newest first. With `stream=true` all events, the oldest first, and new ones until the job ends; the
    header `Last-Event-ID` resumes after the event that it names.
    """
    job = await deps.jobs.get(tenant.id, job_id)
    if stream:
        last = request.headers.get("last-event-id", "")
        seen = number_in(last, EVENT_PREFIX, job.id, "Last-Event-ID") if last else 0
        return await open_stream(request, follow(deps, job.id, seen))
    check_limit(limit, MAX_PAGE)
    before = None if after is None else number_in(after, EVENT_PREFIX, job.id, "after")
    events = await deps.jobs.events(job.id, before=before, limit=limit + 1, newest=True)
    return list_page([event_object(job.id, event) for event in events], limit)


@router.get("/{job_id}/checkpoints", response_model=CheckpointList)
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
    checkpoints = await deps.jobs.checkpoints(job.id)
    if after is not None:
        step = number_in(after, CHECKPOINT_PREFIX, job.id, "after")
        checkpoints = [checkpoint for checkpoint in checkpoints if checkpoint.step < step]
    return list_page([checkpoint_object(job, checkpoint) for checkpoint in checkpoints], limit)


def _created(job: Job, change: Change) -> Response:
    change.of(job.id, adapter=job.name, training_file=job.training_file)
    return json_response(job_object(job), headers={"Location": f"{router.prefix}/{job.id}"})


def _idempotency(request: Request, body: JobBody) -> IdempotencyKey | None:
    """The request's Idempotency-Key with a hash of its body. Raises InvalidField."""
    key = request.headers.get("idempotency-key")
    if key is None:
        return None
    if not 0 < len(key) <= MAX_IDEMPOTENCY_KEY_CHARS:
        raise InvalidField(
            f"Idempotency-Key must have 1 to {MAX_IDEMPOTENCY_KEY_CHARS} characters.", param="Idempotency-Key"
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


def _fixed_part(
    deps: Services,
    tenant: Tenant,
    key: str,
    body: JobBody,
    name: str | None,
    recipe: Recipe,
    stats: dict[str, dict[str, int]],
) -> FixedPart:
    id_ = new_job_id()
    return FixedPart(
        id=id_,
        tenant=tenant.id,
        created=time.time(),
        model=deps.base.id,
        base_digest=deps.base.digest,
        name=name or f"ft-{id_[-8:]}",
        training_file=body.training_file,
        validation_file=body.validation_file,
        recipe=recipe,
        suffix=body.suffix,
        seed=recipe.seed,
        metadata=body.metadata,
        key=key,
        data=stats,
    )


def _data_event(param: str, counts: dict[str, int]) -> bytes:
    """An event that tells what the file of the field `param` holds."""
    cut = f"; {counts['truncated']} are longer than a training example may be, and lose their beginning"
    return new_event(
        "warn" if counts["truncated"] or counts["dropped"] else "info",
        f"{param} has {counts['examples']} examples of {counts['tokens']} tokens, "
        f"{counts['trained_tokens']} of which are learned{cut if counts['truncated'] else ''}.",
        data=dict(counts),
    )


def _metadata_filter(request: Request) -> dict[str, str] | None:
    """The metadata that listed jobs must have; {}: none at all; None: any."""
    query = request.query_params
    if query.get("metadata") == "null":
        return {}
    metadata = {
        name.removeprefix("metadata[").removesuffix("]"): value
        for name, value in query.items()
        if name.startswith("metadata[") and name.endswith("]")
    }
    return metadata or None


def _matches(job: Job, metadata: dict[str, str]) -> bool:
    if not metadata:
        return not job.metadata
    return job.metadata is not None and metadata.items() <= job.metadata.items()
