"""The child's side of a job: fetch what it takes, train, leave the result. One per process.

All it writes it writes under its fence: once the job is another's, nothing of this process counts.
"""

import errno
import logging
import os
import shutil
import signal
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar

import torch
from anyio.from_thread import BlockingPortal, start_blocking_portal
from transformers.utils import logging as transformers_logging

from adapters_store.object_store.store import Objects
from adapters_store.valkey import connect
from server.base_model.resolve import resolve_model
from server.engine.model.placement import choose_placement
from server.errors import (
    CorruptObject,
    NonFinite,
    NotFound,
    PolypeftError,
    StartupError,
    StoreError,
    disk_error,
    shown,
)
from server.files.files import FileStore
from server.finetune.jobs.job import Job, JobError, TrainingResult, result_prefix
from server.finetune.jobs.jobs import Jobs
from server.finetune.training.observer import Stopped
from server.finetune.training.run import TrainingOutput, run_training
from server.finetune.worker import job_errors as faults
from server.finetune.worker.attempt import SAVED
from server.finetune.worker.checkpoints import Checkpoints, store_files
from server.finetune.worker.reporter import OUTAGE_SECONDS, Reporter
from server.finetune.worker.resource_limits import limit_resources
from server.finetune.worker.retry import retry_on_outage
from server.finetune.worker.store_calls import StoreCalls
from server.memory import machine_bytes
from server.settings import Settings

ROOM_BYTES = 8 << 20  # on the disk of a training: with less it is full
ROOM_SECONDS = 1.0  # between two looks whether it still is

T = TypeVar("T")
log = logging.getLogger(__name__)


def train(settings: Settings, id_: str, fence: int, folder: Path) -> None:
    """Train the job and end this process: status 0 when all has been said, SAVED when it was told to stop."""
    transformers_logging.disable_default_handler()  # its warnings as lines of our log
    transformers_logging.enable_propagation()
    cuda = choose_placement(settings).device.type == "cuda"
    limit_resources(settings.max_training_disk_bytes, None if cuda else machine_bytes())
    with start_blocking_portal("asyncio") as portal:
        session = TrainingProcess(settings, portal, folder)
        signal.signal(signal.SIGTERM, session.stop)
        job = session.retry_on_outage(lambda: session.jobs.find(id_))
        if job is None or job.fence != fence:
            log.info("Job %s: another's by now", id_)
            return
        status = session.run(job)
        logging.shutdown()
        os._exit(status)  # at once: torch takes seconds to tear down


class TrainingProcess:
    def __init__(self, settings: Settings, portal: BlockingPortal, folder: Path) -> None:
        assert settings.redis_url is not None, "the worker sets it"
        self._settings = settings
        self._portal = portal
        self._folder = folder
        redis = connect(settings.redis_url)
        self.jobs = Jobs(redis)
        self._objects = Objects.open(settings.store_url, settings.store_config)
        self._objects.on_call = StoreCalls(folder).on_call
        self._files = FileStore(redis, self._objects)
        self._stopping = False

    def stop(self, *_signal: object) -> None:
        self._stopping = True

    def retry_on_outage(self, call: Callable[[], Awaitable[T]]) -> T:
        return self._portal.call(retry_on_outage, call, OUTAGE_SECONDS)

    def run(self, job: Job) -> int:
        """The exit status. Whatever goes wrong is said to the job, or it is the worker's to say."""
        try:
            if self._train(job):
                log.info("Job %s: trained", job.id)
            return 0
        except Stopped as stopped:
            log.info("Job %s: stopped, as wished: %s", job.id, stopped.wish)
            return SAVED if stopped.wish == "pause" else 0
        except Exception as error:
            fault, retry = fault_of(error, self._settings)
            if is_disk_full(error, self._folder):  # libraries say it in words of their own
                fault, retry = faults.DISK_FULL, True
                self._wait_for_room()
            unforeseen = fault is faults.INTERNAL
            log.error("Job %s: %s: %s", job.id, type(error).__name__, fault.code, exc_info=unforeseen)
            self.retry_on_outage(lambda: self.jobs.fail(job.id, job.fence, fault, retry=retry))
            return 0

    def _wait_for_room(self) -> None:
        """At most OUTAGE_SECONDS: the next attempt would end where this one did."""
        end = time.monotonic() + OUTAGE_SECONDS
        while not self._stopping and time.monotonic() < end and is_disk_full(None, self._folder):
            time.sleep(ROOM_SECONDS)

    def _train(self, job: Job) -> bool:
        """False if somebody else has the job by now. Raises whatever `fault_of` knows, and Stopped."""
        checkpoints = Checkpoints(self.jobs, self._objects, job)
        reporter = Reporter(self._portal, self.jobs, checkpoints, job, lambda: self._stopping, self._folder)
        resume = self._restored(checkpoints)
        reporting = self._portal.start_task_soon(reporter.report)
        try:
            trained = run_training(
                job.recipe,
                self._base(job),
                self._fetched(job, "training_file", job.training_file),
                self._fetched(job, "validation_file", job.validation_file) if job.validation_file else None,
                self._folder,
                reporter,
                resume,
                base_id=job.model,
                device=choose_placement(self._settings).device,
            )
        finally:
            reporter.close()
            reporting.result()
        result = self.retry_on_outage(lambda: self._stored(job, trained))
        return self.retry_on_outage(lambda: self.jobs.trained(job.id, job.fence, result))

    def _base(self, job: Job) -> Path:
        if job.model != self._settings.base_id:
            raise StartupError(
                f"This worker has the base {self._settings.base_id}, the job is for {job.model}."
            )
        return resolve_model(self._settings)

    def _restored(self, checkpoints: Checkpoints) -> Path | None:
        """Where to go on. With damaged checkpoints only, the training begins anew, to the same end."""

        async def restore() -> Path | None:
            try:
                return await checkpoints.restore(self._folder / "restored")
            except CorruptObject:
                log.warning("No checkpoint is whole; the training begins anew")
                await checkpoints.prune(kept=0)
                return None

        return self.retry_on_outage(restore)

    def _fetched(self, job: Job, param: str, id_: str) -> Path:
        """The tenant's file on this disk."""
        path = self._folder / f"{param}.jsonl"

        async def fetch() -> None:
            await self._files.download(await self._files.get(job.tenant, id_), path)

        try:
            self.retry_on_outage(fetch)
        except NotFound:
            raise NotFound(f"The {param} {shown(id_)} has been deleted.", param=param) from None
        return path

    async def _stored(self, job: Job, trained: TrainingOutput) -> TrainingResult:
        prefix = result_prefix(job, job.fence)
        return TrainingResult(
            adapter=await store_files(self._objects, [trained.adapter], prefix),
            reports=await store_files(self._objects, [trained.metrics, trained.plot], prefix),
            evaluation=trained.evaluation,
            better=trained.better,
            trained_tokens=trained.trained_tokens,
            steps=trained.steps,
        )


def is_disk_full(error: Exception | None, folder: Path) -> bool:
    """Whether that is why `error` came, or would come again."""
    return (error is not None and disk_error(error) is not None) or (
        not isinstance(error, PolypeftError) and shutil.disk_usage(folder).free < ROOM_BYTES
    )


def fault_of(error: Exception, settings: Settings) -> tuple[JobError, bool]:
    """What a tenant is told of `error`, and whether another attempt may go better."""
    match error:
        case StoreError():
            return faults.LATE_STORES, True
        case StartupError():  # the operator's: this worker cannot load the base
            return faults.INTERNAL, True
        case PolypeftError():
            return faults.refused(error), error.status >= 500 and not isinstance(error, NonFinite)
        case MemoryError() | torch.OutOfMemoryError():
            return faults.OUT_OF_MEMORY, False
        case RuntimeError() if "can't allocate memory" in str(error):  # torch's allocator on a CPU
            return faults.OUT_OF_MEMORY, False
        case OSError(errno=errno.EFBIG):
            return faults.too_large(settings.max_training_disk_bytes), False
    return faults.INTERNAL, False
