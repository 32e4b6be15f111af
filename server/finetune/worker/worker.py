"""The worker: takes job ids from the queue and runs one job at a time, each in a process of its own.

An entry of the queue only says where to look; whether there is work, the job's record says. `Jobs.sweep`,
which every worker runs every few seconds, pushes lost entries again. A second entry finds nothing to take.
"""

import asyncio
import logging
import os
import signal
import socket
import sys
import threading
import uuid
from collections.abc import Sequence
from pathlib import Path

from redis.asyncio import Redis

from adapters_store.maintenance.scheduled_deletes import ScheduledDeletes
from adapters_store.object_store.store import Objects
from adapters_store.registry.identity import prove_identity_in_time
from adapters_store.valkey import connect
from server.errors import StartupError, StoreError
from server.finetune.jobs.jobs import Jobs
from server.finetune.jobs.queue import WorkerQueue
from server.finetune.jobs.stats import report
from server.finetune.worker.attempt import Attempt
from server.finetune.worker.metrics import WorkerMetrics
from server.finetune.worker.retry import retry_on_outage
from server.finetune.worker.work_dirs import attempt_dir, worker_dir
from server.settings import OFFLINE, SPINS, Settings, child_environment

COMMAND = (sys.executable, "-m", "server.finetune")  # of the child; the job's id, fence and folder follow
SWEEP_SECONDS = 5.0
WAIT_SECONDS = 1.0  # one wait for an entry of the queue; also how long an idle worker may take to stop
TAKE_SECONDS = 30.0  # the longest wait for Valkey; then the entry is lost, and `sweep` pushes it again
LAST_REPORT_SECONDS = 1.0  # the longest wait for the last report of metrics
RETRY_SECONDS = 2.0  # between two tries while Valkey does not answer

log = logging.getLogger(__name__)


class Worker:
    """The worker process: a loop that runs jobs, and a thread that sweeps and reports metrics."""

    def __init__(self, settings: Settings, command: Sequence[str] = COMMAND) -> None:
        if settings.redis_url is None:
            raise StartupError("A worker needs redis_url: the Valkey that its servers use.")
        self.settings = settings
        self.url = settings.redis_url
        self.stopping = False
        self.metrics = WorkerMetrics(settings.base_id)
        self._over = threading.Event()
        self._command = command
        self._name = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"

    def work(self) -> None:
        """Run jobs until SIGTERM or SIGINT, also over outages of Valkey. Raises StartupError."""
        asyncio.run(self._check_store())
        if self.settings.metrics_port:
            self._serve_metrics(self.settings.metrics_host, self.settings.metrics_port)
        sweeping = threading.Thread(target=self._sweep, name="sweep", daemon=True)
        sweeping.start()
        with worker_dir(self.settings.data_dir.absolute() / "finetune", self._name) as folder:
            asyncio.run(self._run_jobs(folder))
        self._over.set()
        sweeping.join(LAST_REPORT_SECONDS)

    def stop(self) -> None:
        """Take no more jobs; the one that runs saves what it has and goes back to the queue."""
        self.stopping = True

    async def _run_jobs(self, folder: Path) -> None:
        """Run each job that the queue names, until `stop`."""
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, self.stop)
        async with connect(self.url) as redis:
            jobs, queue = Jobs(redis), WorkerQueue(redis)
            while not self.stopping:
                id_ = await self._next_job(queue)
                if id_ is not None:
                    await self._run_job(jobs, id_, folder)

    async def _next_job(self, queue: WorkerQueue) -> str | None:
        """The next entry of the queue; None if none has come or Valkey does not answer."""
        try:
            id_ = await queue.take(WAIT_SECONDS)
            if id_ is None or not self.stopping:
                return id_
            await queue.push(id_)  # for another worker
        except StoreError as error:
            log.warning("Valkey does not answer: %s", error.message)
            await asyncio.sleep(RETRY_SECONDS)
        return None

    async def _run_job(self, jobs: Jobs, id_: str, folder: Path) -> None:
        """Make an attempt at the job. After an error `sweep` finds the job and queues it again."""
        try:
            await self._attempt(jobs, id_, folder)
        except StoreError as error:
            log.warning("Job %s: left to whoever sweeps: %s", id_, error.message)
        except OSError as error:
            log.warning("Job %s: left to whoever sweeps: %s", id_, error.strerror)
        except Exception:
            log.exception("Job %s: the worker failed; left to whoever sweeps", id_)

    async def _attempt(self, jobs: Jobs, id_: str, folder: Path) -> None:
        """Train the job if it waits for a worker. Raises StoreError; the job's record stays consistent."""
        name = f"{self._name}-{uuid.uuid4().hex}"
        with attempt_dir(folder, id_) as job_folder:  # before `take`: a worker with a full disk takes no job
            job = await retry_on_outage(lambda: jobs.take(id_, name), TAKE_SECONDS, lambda: self.stopping)
            if job is None:
                log.info("Job %s: not waiting for a worker", id_)
                return
            attempt = Attempt(
                jobs,
                job,
                command=self._command,
                environment=self._environment(),
                folder=job_folder,
                disk_bytes=self.settings.max_training_disk_bytes,
                stopping=lambda: self.stopping,
                metrics=self.metrics,
            )
            await attempt.run()

    async def _check_store(self) -> None:
        """Raise StartupError unless the servers of this Valkey use the same object store."""
        redis = connect(self.url)
        try:
            objects = Objects.open(self.settings.store_url, self.settings.store_config)
            await prove_identity_in_time(redis, objects)
        finally:
            await redis.aclose()

    def _environment(self) -> dict[str, str]:
        """The child's environment: it ends with this process and reaches no hub.

        The stores' secrets are passed in the environment only, never in arguments.
        """
        settings = self.settings.model_copy(update={"supervisor_pid": os.getpid()})
        return child_environment(settings) | OFFLINE | SPINS

    def _serve_metrics(self, host: str, port: int) -> None:
        """Serve the worker's own /metrics; a port in use is logged and ends nothing."""
        try:
            self.metrics.serve(host, port)
        except StartupError as error:
            log.error("No figures: %s", error.message)

    async def _report_metrics(self, redis: Redis) -> None:
        """Add what is new to the statistics in Valkey. Raises StoreError."""
        increments = self.metrics.unreported()
        worker = self._name.rpartition("-")[2]
        await report(redis, worker, self.metrics.busy, self.metrics.loss, increments)
        self.metrics.mark_reported(increments)

    def _sweep(self) -> None:
        asyncio.run(self._sweep_until_over())

    async def _sweep_until_over(self) -> None:
        """Sweep jobs and deletions and report metrics every SWEEP_SECONDS; a last report at the end."""
        jobs = Jobs(redis := connect(self.url))
        objects = Objects.open(self.settings.store_url, self.settings.store_config)
        objects.on_call = self.metrics.store.on_call
        deletes = ScheduledDeletes(redis, objects)
        while not self._over.is_set():
            try:
                await jobs.sweep()
                await deletes.sweep()
                await self._report_metrics(redis)
            except StoreError as error:
                log.warning("No sweep: %s", error.message)
            except Exception:  # lost jobs depend on the sweep, so it must go on
                log.exception("The sweep failed")
            self._over.wait(SWEEP_SECONDS)  # blocks the loop, which has no other task
        try:
            await self._report_metrics(redis)  # includes the last job's outcome
        except StoreError as error:
            log.warning("The last figures are lost: %s", error.message)


def serve(settings: Settings) -> None:
    Worker(settings).work()
