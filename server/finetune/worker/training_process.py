"""The process that trains one job: it fetches the files, trains, and stores the result.

All it writes to the job's record it writes under its fence; once another worker has the job, all is refused.
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
from server.finetune.worker import job_errors
from server.finetune.worker.attempt import EXIT_SAVED
from server.finetune.worker.checkpoints import Checkpoints, store_files
from server.finetune.worker.reporter import OUTAGE_SECONDS, Reporter
from server.finetune.worker.resource_limits import limit_resources
from server.finetune.worker.retry import retry_on_outage
from server.finetune.worker.store_calls import StoreCalls
from server.memory import machine_bytes
from server.settings import Settings

MIN_FREE_BYTES = 8 << 20  # with less free space a disk counts as full
DISK_POLL_SECONDS = 1.0  # between two checks of a full disk

T = TypeVar("T")
log = logging.getLogger(__name__)


def train(settings: Settings, id_: str, fence: int, folder: Path) -> None:
    """Train the job and end this process: status 0 once the outcome is reported, EXIT_SAVED after a pause."""
    transformers_logging.disable_default_handler()  # its warnings go to our log
    transformers_logging.enable_propagation()
    cuda = choose_placement(settings).device.type == "cuda"
    limit_resources(settings.max_training_disk_bytes, None if cuda else machine_bytes())
    with start_blocking_portal("asyncio") as portal:
        process = TrainingProcess(settings, portal, folder)
        signal.signal(signal.SIGTERM, process.stop)
        job = process.retry_on_outage(lambda: process.jobs.find(id_))
        if job is None or job.fence != fence:
            log.info("Job %s: another's by now", id_)
            return
        status = process.run(job)
        logging.shutdown()
        os._exit(status)  # at once: torch's clean-up takes seconds


class TrainingProcess:
    """The connections of a training process, and the training of its job."""

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
        """Train and report the outcome; returns the exit status. The worker reports what this cannot."""
        try:
            if self._train(job):
                log.info("Job %s: trained", job.id)
            return 0
        except Stopped as stopped:
            log.info("Job %s: stopped, as wished: %s", job.id, stopped.signal)
            return EXIT_SAVED if stopped.signal == "pause" else 0
        except Exception as error:
            job_error, retry = job_error_of(error, self._settings)
            if is_disk_full(error, self._folder):  # libraries wrap it in errors of their own
                job_error, retry = job_errors.DISK_FULL, True
                self._wait_for_space()
            unexpected = job_error is job_errors.INTERNAL
            log.error("Job %s: %s: %s", job.id, type(error).__name__, job_error.code, exc_info=unexpected)
            self.retry_on_outage(lambda: self.jobs.fail(job.id, job.fence, job_error, retry=retry))
            return 0

    def _wait_for_space(self) -> None:
        """Wait until the disk has space, at most OUTAGE_SECONDS; the next attempt would fail there again."""
        end = time.monotonic() + OUTAGE_SECONDS
        while not self._stopping and time.monotonic() < end and is_disk_full(None, self._folder):
            time.sleep(DISK_POLL_SECONDS)

    def _train(self, job: Job) -> bool:
        """False if another worker has the job by now. Raises Stopped, and what `job_error_of` translates."""
        checkpoints = Checkpoints(self.jobs, self._objects, job)
        reporter = Reporter(self._portal, self.jobs, checkpoints, job, lambda: self._stopping, self._folder)
        resume = self._restore(checkpoints)
        reporting = self._portal.start_task_soon(reporter.report)
        try:
            trained = run_training(
                job.recipe,
                self._base(job),
                self._fetch(job, "training_file", job.training_file),
                self._fetch(job, "validation_file", job.validation_file) if job.validation_file else None,
                self._folder,
                reporter,
                resume,
                base_id=job.model,
                device=choose_placement(self._settings).device,
                tool_format=self._settings.tool_format,
            )
        finally:
            reporter.close()
            reporting.result()
        result = self.retry_on_outage(lambda: self._store_result(job, trained))
        return self.retry_on_outage(lambda: self.jobs.trained(job.id, job.fence, result))

    def _base(self, job: Job) -> Path:
        if job.model != self._settings.base_id:
            raise StartupError(
                f"This worker has the base {self._settings.base_id}, the job is for {job.model}."
            )
        return resolve_model(self._settings)

    def _restore(self, checkpoints: Checkpoints) -> Path | None:
        """The folder to resume from.

        If all checkpoints are damaged, the training starts again from step 0.
        """

        async def restore() -> Path | None:
            try:
                return await checkpoints.restore(self._folder / "restored")
            except CorruptObject:
                log.warning("No checkpoint is whole; the training begins anew")
                await checkpoints.prune(kept=0)
                return None

        return self.retry_on_outage(restore)

    def _fetch(self, job: Job, param: str, id_: str) -> Path:
        """Download one of the tenant's files. Raises NotFound if it was deleted."""
        path = self._folder / f"{param}.jsonl"

        async def fetch() -> None:
            await self._files.download(await self._files.get(job.tenant, id_, expired=True), path)

        try:
            self.retry_on_outage(fetch)
        except NotFound:
            raise NotFound(f"The {param} {shown(id_)} has been deleted.", param=param) from None
        return path

    async def _store_result(self, job: Job, trained: TrainingOutput) -> TrainingResult:
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
    """Whether `error` was caused by a full disk, or the disk is full and may have caused it."""
    return (error is not None and disk_error(error) is not None) or (
        not isinstance(error, PolypeftError) and shutil.disk_usage(folder).free < MIN_FREE_BYTES
    )


def job_error_of(error: Exception, settings: Settings) -> tuple[JobError, bool]:
    """The error as the tenant sees it, and whether another attempt may succeed."""
    match error:
        case StoreError():
            return job_errors.STORES_UNAVAILABLE, True
        case StartupError():  # the operator's mistake: this worker cannot load the base
            return job_errors.INTERNAL, True
        case PolypeftError():
            return job_errors.refused(error), error.status >= 500 and not isinstance(error, NonFinite)
        case MemoryError() | torch.OutOfMemoryError():
            return job_errors.OUT_OF_MEMORY, False
        case RuntimeError() if "can't allocate memory" in str(error):  # torch's allocator on a CPU
            return job_errors.OUT_OF_MEMORY, False
        case OSError(errno=errno.EFBIG):
            return job_errors.too_large(settings.max_training_disk_bytes), False
    return job_errors.INTERNAL, False
