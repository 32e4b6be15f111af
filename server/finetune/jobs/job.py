"""What there is to know of one fine-tuning job, and what a worker says about it. Plain data, no I/O.

A job's `status` is what OpenAI's API calls it, its `phase` where it stands here:

    queued -> training -> publishing -> done        done: succeeded, failed or cancelled, for ever
      ^  \\______/ |
      |   worker  v
      +------- paused                               shown as status "queued" with paused: true
"""

import time
import uuid
from typing import Any, Literal

import msgspec

from adapters_store.names import TENANTS
from server.finetune.recipe import Recipe

Status = Literal["queued", "running", "succeeded", "failed", "cancelled"]
Phase = Literal["queued", "training", "paused", "publishing", "done"]
Level = Literal["info", "warn", "error"]
Wish = Literal["go", "pause", "cancel", "lost"]
"""What a worker is to do: go on; save and call `paused`; stop (the job is cancelled already); stop, because
another worker has the job or it is gone."""


class JobError(msgspec.Struct, frozen=True):
    code: str
    message: str  # one sentence, shown to the tenant: no path, no traceback
    param: str | None = None  # training_file, validation_file or nothing


class StoredFile(msgspec.Struct, frozen=True):
    """A file that a worker left in the object store."""

    name: str  # adapter_config.json, metrics.csv, ...
    key: str
    sha256: str
    bytes: int


class TrainingResult(msgspec.Struct, frozen=True, kw_only=True):
    """What a finished training leaves: `better` is the evaluation's verdict, None where there was none."""

    adapter: list[StoredFile]  # the config and the safetensors file, as an upload would bring them
    reports: list[StoredFile]  # per-step metrics (CSV), loss plot (PNG): become the tenant's result files
    evaluation: dict[str, Any] | None  # base and adapted side by side, JSON
    better: bool | None
    trained_tokens: int
    steps: int


class Progress(msgspec.Struct, frozen=True, kw_only=True):
    step: int
    total_steps: int
    trained_tokens: int
    estimated_finish: int | None = None  # Unix seconds


class FixedPart(msgspec.Struct, frozen=True, kw_only=True):
    """What is decided when a job is created and never changes."""

    id: str  # ftjob-...
    tenant: str
    created: float  # Unix seconds; lists go by it
    model: str  # the base's id
    base_digest: str
    name: str  # of the adapter that a version will be added to
    training_file: str
    validation_file: str | None = None
    recipe: Recipe
    suffix: str | None = None
    seed: int
    metadata: dict[str, str] | None = None
    data: dict[str, dict[str, int]] = {}  # training_file, validation_file -> examples, tokens, truncated, ...


class Job(FixedPart, frozen=True, kw_only=True):
    status: Status = "queued"
    phase: Phase = "queued"
    fence: int = 0  # whoever works under a lower one works in vain
    attempts: int = 0  # takes since the last checkpoint that was new
    lease_until: int = 0  # milliseconds on Valkey's clock
    pausing: bool = False  # wished, and not yet done
    started: int | None = None  # Unix seconds, as all below
    finished: int | None = None
    estimated_finish: int | None = None
    step: int = 0
    total_steps: int = 0
    trained_tokens: int = 0
    error: JobError | None = None
    result: TrainingResult | None = None  # from phase publishing on
    intended: int = 0  # the version number the publisher has committed itself to
    version: int | None = None
    fine_tuned_model: str | None = None
    result_files: list[str] = []

    @property
    def evaluation(self) -> dict[str, Any] | None:
        return self.result.evaluation if self.result else None


class Event(msgspec.Struct, frozen=True, kw_only=True):
    created: int
    level: Level
    message: str
    type: Literal["message", "metrics"] = "message"
    data: dict[str, Any] | None = None
    nonce: str  # makes each event a member of its own
    sequence: int = 0  # 1, 2, ... within its job; not stored, it is the member's score


class Checkpoint(msgspec.Struct, frozen=True, kw_only=True):
    created: int
    step: int
    metrics: dict[str, float]  # OpenAI's names: step, train_loss, valid_loss, ...
    files: list[StoredFile] = []  # what a worker needs to go on from here


def job_prefix(tenant: str, job: str) -> str:
    """Under it lies everything workers write for a job; it is removed some time after the job has ended."""
    return f"{TENANTS}/{tenant}/jobs/{job}"


def checkpoint_prefix(job: FixedPart, step: int, fence: int) -> str:
    return f"{job_prefix(job.tenant, job.id)}/checkpoints/{step:08d}-{fence}"


def result_prefix(job: FixedPart, fence: int) -> str:
    return f"{job_prefix(job.tenant, job.id)}/result/{fence}"


def new_event(
    level: Level,
    message: str,
    type: Literal["message", "metrics"] = "message",  # noqa: A002 - OpenAI's name
    data: dict[str, Any] | None = None,
) -> bytes:
    """An event as it is stored. Made once and written twice, it is one event."""
    nonce, now = uuid.uuid4().hex, int(time.time())
    event = Event(created=now, level=level, message=message, type=type, data=data, nonce=nonce)
    return msgspec.json.encode(event)
