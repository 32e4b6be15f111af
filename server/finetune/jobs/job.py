"""The record of a fine-tuning job and what workers report about it: plain data, no I/O.

A job's `status` has OpenAI's values; its `phase` is the state of our state machine:

    queued -> training -> publishing -> done        done: succeeded, failed or cancelled; final
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
ControlSignal = Literal["go", "pause", "cancel", "lost"]
"""What a heartbeat tells a worker to do: train on; save a checkpoint and report `paused`; stop, because the
job is cancelled; stop, because another worker has the job or its record is gone."""


class JobError(msgspec.Struct, frozen=True):
    """Why a job or an attempt at it failed, in the form of OpenAI's API."""

    code: str
    message: str  # one sentence, shown to the tenant: no path, no traceback
    param: str | None = None  # training_file or validation_file, if one is to blame


class StoredFile(msgspec.Struct, frozen=True):
    """A file that a worker has put into the object store."""

    name: str  # adapter_config.json, metrics.csv, ...
    key: str
    sha256: str
    bytes: int


class TrainingResult(msgspec.Struct, frozen=True, kw_only=True):
    """What a finished training has produced. `better` is the evaluation's verdict; None without one."""

    adapter: list[StoredFile]  # the config and the safetensors file, as in an upload
    reports: list[StoredFile]  # per-step metrics (CSV), loss plot (PNG): become the tenant's result files
    evaluation: dict[str, Any] | None  # base and adapted side by side, JSON
    better: bool | None
    trained_tokens: int
    steps: int


class Progress(msgspec.Struct, frozen=True, kw_only=True):
    """What a worker reports with a heartbeat. `trained_tokens` is the total of all attempts."""

    step: int
    total_steps: int
    trained_tokens: int
    estimated_finish: int | None = None  # Unix seconds


class FixedPart(msgspec.Struct, frozen=True, kw_only=True):
    """The fields of a job that are set at its creation and never change."""

    id: str  # ftjob-...
    tenant: str
    created: float  # Unix seconds; lists are sorted by it
    model: str  # the base's id
    base_digest: str
    name: str  # of the adapter that gets a new version
    training_file: str
    validation_file: str | None = None
    recipe: Recipe
    suffix: str | None = None
    seed: int
    metadata: dict[str, str] | None = None
    key: str = ""  # the id of the API key that asked for it
    data: dict[str, dict[str, int]] = {}  # training_file, validation_file -> examples, tokens, truncated, ...


class Job(FixedPart, frozen=True, kw_only=True):
    """A job's record: its fixed part and its state."""

    status: Status = "queued"
    phase: Phase = "queued"
    fence: int = 0  # fencing token; what a worker writes under a lower one is refused
    attempts: int = 0  # times a worker took the job since its last new checkpoint
    lease_until: int = 0  # milliseconds on Valkey's clock
    pausing: bool = False  # a pause is requested and the worker has not confirmed it
    started: int | None = None  # Unix seconds, as all below
    finished: int | None = None
    estimated_finish: int | None = None
    step: int = 0
    total_steps: int = 0
    trained_tokens: int = 0
    error: JobError | None = None
    result: TrainingResult | None = None  # from phase publishing on
    intended: int = 0  # the version number that the publisher has committed the job to
    version: int | None = None
    fine_tuned_model: str | None = None
    result_files: list[str] = []

    @property
    def evaluation(self) -> dict[str, Any] | None:
        return self.result.evaluation if self.result else None


class Event(msgspec.Struct, frozen=True, kw_only=True):
    """One line of a job's log. It is stored as JSON in a sorted set, with `sequence` as its score.

    A further field needs a default, since stored events lack it; `new_event` sets it, and `event_object` of
    api/fine_tuning/json_objects.py shows it.
    """

    created: int
    level: Level
    message: str
    type: Literal["message", "metrics"] = "message"
    data: dict[str, Any] | None = None
    nonce: str  # distinguishes events with equal text: members of a set are unique
    sequence: int = 0  # 1, 2, ... within its job; not part of the stored JSON


class Checkpoint(msgspec.Struct, frozen=True, kw_only=True):
    """A saved state of the training, and the metrics at its step."""

    created: int
    step: int
    metrics: dict[str, float]  # OpenAI's names: step, train_loss, valid_loss, ...
    files: list[StoredFile] = []  # what a worker resumes from; empty once pruned


def job_prefix(tenant: str, job: str) -> str:
    """Prefix of all objects that workers write for a job; removed some time after the job has ended."""
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
    """An Event as stored JSON. Writing the same bytes twice stores one event."""
    nonce, now = uuid.uuid4().hex, int(time.time())
    event = Event(created=now, level=level, message=message, type=type, data=data, nonce=nonce)
    return msgspec.json.encode(event)
