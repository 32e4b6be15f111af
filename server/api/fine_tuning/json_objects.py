"""OpenAI's JSON objects of fine-tuning jobs, events and checkpoints, with a few fields of ours."""

from typing import Any

from server.errors import InvalidField, shown
from server.finetune.jobs.job import Checkpoint, Event, Job
from server.finetune.recipe import recipe_object

EVENT_PREFIX = "ftevent-"
CHECKPOINT_PREFIX = "ftckpt-"


def job_object(job: Job) -> dict[str, Any]:
    """`fine_tuning.job` with OpenAI's fields, then ours."""
    recipe = recipe_object(job.recipe)
    return {
        "id": job.id,
        "object": "fine_tuning.job",
        "created_at": int(job.created),
        "started_at": job.started,
        "finished_at": job.finished,
        "estimated_finish": job.estimated_finish,
        "model": job.model,
        "fine_tuned_model": job.fine_tuned_model,
        "organization_id": job.tenant,
        "status": job.status,
        "error": job.error,
        "training_file": job.training_file,
        "validation_file": job.validation_file,
        "result_files": job.result_files,
        "trained_tokens": job.trained_tokens if job.status == "succeeded" else None,
        "hyperparameters": recipe["hyperparameters"],
        "method": recipe["method"],
        "seed": job.seed,
        "integrations": [],
        "metadata": job.metadata,
        # ours
        "suffix": job.suffix,
        "adapter": job.name,
        "version": job.version,
        "paused": job.phase == "paused",
        "progress": {
            "phase": job.phase,
            "step": job.step,
            "total_steps": job.total_steps,
            "trained_tokens": job.trained_tokens,
            "attempts": job.attempts,
        },
        "data": job.data,
        "evaluation": job.evaluation,
    }


def event_object(job: str, event: Event) -> dict[str, Any]:
    data = {} if event.data is None else {"data": event.data}
    return {
        "object": "fine_tuning.job.event",
        "id": event_id(job, event.sequence),
        "created_at": event.created,
        "level": event.level,
        "message": event.message,
        "type": event.type,
    } | data


def checkpoint_object(job: Job, checkpoint: Checkpoint) -> dict[str, Any]:
    """A checkpoint can resume the training; only the final adapter is published and served."""
    return {
        "object": "fine_tuning.job.checkpoint",
        "id": checkpoint_id(job.id, checkpoint.step),
        "created_at": checkpoint.created,
        "fine_tuning_job_id": job.id,
        "fine_tuned_model_checkpoint": f"ft:{job.model}:{job.name}:{job.id}:ckpt-step-{checkpoint.step}",
        "step_number": checkpoint.step,
        "metrics": checkpoint.metrics,
    }


def event_id(job: str, sequence: int) -> str:
    return f"{EVENT_PREFIX}{_hex(job)}-{sequence}"


def checkpoint_id(job: str, step: int) -> str:
    return f"{CHECKPOINT_PREFIX}{_hex(job)}-{step}"


def number_in(id_: str, prefix: str, job: str, param: str) -> int:
    """The sequence or step number in an id of an event or checkpoint of `job`. Raises InvalidField."""
    number = id_.removeprefix(f"{prefix}{_hex(job)}-")
    if number == id_ or not (number.isascii() and number.isdecimal() and len(number) < 16):
        raise InvalidField(f"{param} is {shown(id_)}, which is no id of this job's.", param=param)
    return int(number)


def _hex(job: str) -> str:
    return job.partition("-")[2]
