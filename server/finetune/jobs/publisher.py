"""The publisher: runs the admission check on trained adapters and publishes them. It runs in the API process,
which has the engine.

A publisher may die at any point, and several may run. A job is committed to one version number before that
version can exist, and the next publisher first checks whether it exists; so one version results in the end.
"""

import asyncio
import hashlib
import logging
import time
import uuid
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Protocol

import msgspec

from adapters_store.manifest import Manifest
from adapters_store.object_store.store import Objects
from adapters_store.registry.registry import Registry
from server.errors import (
    Conflict,
    DeadlineExceeded,
    EngineLost,
    InvalidAdapter,
    NotFound,
    PolypeftError,
    StoreError,
    Unavailable,
)
from server.files.files import FileStore
from server.finetune.jobs.backoff import Backoff
from server.finetune.jobs.job import Job, JobError, StoredFile, TrainingResult, new_event
from server.finetune.jobs.jobs import Jobs

POLL_SECONDS = 1.0
SWEEP_SECONDS = 5.0
MAX_TRIES = 3  # with an error that is not expected to pass by itself
MAX_DELAY_SECONDS = 60.0  # between two tries of a job by this publisher
FILES_MISSING = "The trained files are not found in the object store; publishing goes on as soon as they are."
JOB_FACT = "job"  # the manifest's fact that names the job of a version
log = logging.getLogger(__name__)


class AdmissionCheck(Protocol):
    """The check that every adapter passes before publication (api/adapters/publish.py implements it)."""

    @property
    def ready(self) -> bool: ...

    def folder(self) -> TemporaryDirectory[str]:
        """A temporary folder for the adapter's files."""
        ...

    async def prepare(self, tenant: str, name: str, version: int, files: list[Path]) -> Manifest:
        """The manifest of the adapter in `files`. Raises PolypeftError if it may not be published."""
        ...


class Publisher:
    """Publishes trained jobs, one at a time, and sweeps jobs and deletions."""

    def __init__(
        self, jobs: Jobs, files: FileStore, registry: Registry, objects: Objects, admission: AdmissionCheck
    ) -> None:
        self._jobs = jobs
        self._files = files
        self._registry = registry
        self._objects = objects
        self._admission = admission
        self._id = uuid.uuid4().hex
        self._delays = Backoff(POLL_SECONDS, MAX_DELAY_SECONDS)

    async def run(self) -> None:
        """Publish and sweep until cancelled. The next publisher finishes what was interrupted."""
        swept_at = 0.0
        while True:
            try:
                if self._admission.ready:
                    await self.publish_all()
                if time.monotonic() - swept_at > SWEEP_SECONDS:
                    swept_at = time.monotonic()
                    await self._jobs.sweep()
                    await self._files.scheduled_deletes.sweep()
            except StoreError as error:
                log.warning("Publishing and sweeping wait: %s", error)
            except Exception:
                log.exception("A round of publishing failed")
            await asyncio.sleep(POLL_SECONDS)

    async def publish_all(self) -> None:
        """Try each trained job that is due and that no other publisher has claimed. Raises StoreError."""
        waiting = await self._jobs.to_publish()
        self._delays.keep_only(waiting)
        for id_ in waiting:
            if self._delays.is_due(id_) and await self._jobs.claim(id_, self._id):
                await self._try(id_)

    async def _try(self, id_: str) -> None:
        """Publish the job, fail it, or leave it for a later try, with growing delays."""
        try:
            await self._publish(id_)
            self._delays.forget(id_)
        except NotFound as error:  # the store was restored from a backup, or is another one
            self._delays.failed(id_)
            if await self._jobs.report_waiting(id_, self._id, FILES_MISSING):
                log.warning("The version of %s waits: %s", id_, error)
        except EngineLost as error:  # perhaps because of this adapter
            await self._count_failure(id_, error)
        except (Unavailable, DeadlineExceeded) as error:
            self._delays.failed(id_)
            log.warning("The version of %s waits: %s", id_, error)
        except PolypeftError as error:
            if error.status >= 500:
                await self._count_failure(id_, error)
            else:
                await self._jobs.reject(id_, JobError(error.code, error.message))
        except Exception:
            log.exception("Publishing %s failed", id_)
            await self._count_failure(id_, PolypeftError("The server failed to publish the trained adapter."))

    async def _count_failure(self, id_: str, error: PolypeftError) -> None:
        if await self._jobs.count_failure(id_) >= MAX_TRIES:
            await self._jobs.reject(id_, JobError(error.code, error.message))

    async def _publish(self, id_: str) -> None:
        job = await self._jobs.find(id_)
        if job is None or job.result is None or job.phase != "publishing":
            return
        version = job.intended
        if not version or not await self._has_published(job, version):
            with self._admission.folder() as folder:
                published = await self._publish_new(job, job.result, Path(folder))
            if published is None:  # cancelled before the commitment
                for report in job.result.reports:
                    await self._delete_report(job, report)
                return
            version = published
        await self._succeed(job, job.result, version)

    async def _publish_new(self, job: Job, result: TrainingResult, folder: Path) -> int | None:
        """Check the adapter and publish it: its version number, or None if the job was cancelled."""
        for report in result.reports:
            await self._store_report(job, report, folder / report.name)
        files = [folder / file.name for file in result.adapter]
        for file, path in zip(result.adapter, files, strict=True):
            await self._objects.download(file.key, path, file.sha256)
        next_version = await self._registry.next_version(job.tenant, job.name)
        manifest = await self._admission.prepare(job.tenant, job.name, next_version, files)
        if manifest.base_digest != job.base_digest:
            raise InvalidAdapter("The base model has changed since this job was created.")
        manifest = msgspec.structs.replace(
            manifest,
            facts=manifest.facts | {JOB_FACT: job.id},
            evaluation=result.evaluation,
            promoted=promoted(job, result),
        )
        return await self._commit(job, manifest)

    async def _commit(self, job: Job, manifest: Manifest) -> int | None:
        """Publish under the version number that the job is committed to: that number; None if it ended."""
        version = job.intended or await self._jobs.commit_to_version(job.id, 0, manifest.version)
        while version is not None:
            try:
                await self._registry.publish(msgspec.structs.replace(manifest, version=version))
                break
            except Conflict:
                if await self._has_published(job, version):
                    break
            # an upload took the number, so no publisher can use it for this job any more
            next_version = await self._registry.next_version(job.tenant, job.name)
            version = await self._jobs.commit_to_version(job.id, version, next_version)
        return version

    async def _succeed(self, job: Job, result: TrainingResult, version: int) -> None:
        model = f"{job.name}@{version}"
        events = [new_event("info", f"New fine-tuned model created: {model}")]
        if not promoted(job, result):
            events.append(new_event("warn", _why_not_latest(job, model)))
        events.append(new_event("info", "The job has successfully completed"))
        # the figures first: OpenAI's only result file, which its examples read as result_files[0]
        figures_first = sorted(result.reports, key=lambda report: not report.name.endswith(".csv"))
        reports = [report_id(job, report) for report in figures_first]
        if not await self._jobs.succeed(job.id, version, model, reports, *events):
            current = await self._jobs.find(job.id)
            if (current is None or current.version != version) and await self._has_published(job, version):
                await self._registry.delete(job.tenant, job.name, version)

    async def _has_published(self, job: Job, version: int) -> bool:
        """Whether this version exists and is the job's."""
        try:
            manifest = await self._registry.manifest(job.tenant, job.name, version)
        except NotFound:
            return False
        return manifest.facts.get(JOB_FACT) == job.id

    async def _store_report(self, job: Job, report: StoredFile, path: Path) -> None:
        await self._objects.download(report.key, path, report.sha256)
        await self._files.add(
            job.tenant,
            path,
            report.name,
            report.sha256,
            size=report.bytes,
            purpose="fine-tune-results",
            id_=report_id(job, report),
        )

    async def _delete_report(self, job: Job, report: StoredFile) -> None:
        try:
            await self._files.delete(job.tenant, report_id(job, report))
        except NotFound:
            log.debug("%s had no file for %s yet", job.id, report.name)


def promoted(job: Job, result: TrainingResult) -> bool:
    """Whether `latest` may point at the version. A training without evaluation counts as better."""
    return job.recipe.publish == "always" or (
        job.recipe.publish == "if_better" and result.better is not False
    )


def report_id(job: Job, report: StoredFile) -> str:
    """The id of the tenant's file for this report, the same in every publisher."""
    return f"file-{hashlib.sha256(f'{job.id}/{report.name}'.encode()).hexdigest()[:24]}"


def _why_not_latest(job: Job, model: str) -> str:
    if job.recipe.publish == "never":
        return f"As asked, `latest` stays where it is; {model} serves under its own name."
    return (
        f"On the held-out examples {model} is no better than the base: `latest` stays where it is, if there "
        f"was a version before. {model} serves under its own name."
    )
