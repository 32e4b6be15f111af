"""The worker: waits for calls and runs one job at a time, each in a process of its own.

rq brings the calls; whether there is anything to do, the job's record says. A call that is lost is made
again by `Jobs.sweep`, which every worker runs every few seconds; one that comes twice finds nothing to take.
"""

import asyncio
import logging
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Sequence
from types import FrameType
from typing import Any

from redis import Redis
from redis.asyncio import Redis as AsyncRedis
from redis.exceptions import RedisError, TimeoutError  # noqa: A004 - redis names it so
from rq import SimpleWorker
from rq.exceptions import StopRequested
from rq.serializers import JSONSerializer
from rq.timeouts import BaseDeathPenalty
from rq.worker import WorkerStatus

from adapters_store.maintenance.scheduled_deletes import ScheduledDeletes
from adapters_store.object_store.store import Objects
from adapters_store.registry.identity import prove_identity_in_time
from adapters_store.valkey import CONNECT_SECONDS, connect
from server.errors import StartupError, StoreError
from server.finetune.jobs.jobs import Jobs
from server.finetune.jobs.queue import NAME, WorkerQueue
from server.finetune.jobs.stats import report
from server.finetune.worker.attempt import Attempt
from server.finetune.worker.metrics import WorkerMetrics
from server.finetune.worker.retry import retry_on_outage
from server.finetune.worker.work_dirs import attempt_dir, worker_dir
from server.settings import OFFLINE, SPINS, Settings, child_environment

COMMAND = (sys.executable, "-m", "server.finetune")  # the child: it gets the job's id, its fence and a folder
SWEEP_SECONDS = 5.0
TAKE_SECONDS = 30.0  # for the stores to answer; after that the call is lost, and made again
RQ_SECONDS = 60  # rq's life signs; its calls wait a quarter less at a time
FAREWELL_SECONDS = 1.0
AGAIN_SECONDS = 2.0  # after rq has given up

log = logging.getLogger(__name__)


class Worker:
    """What `run` needs beside a job's id, and the order to stop."""

    def __init__(self, settings: Settings, command: Sequence[str] = COMMAND) -> None:
        if settings.redis_url is None:
            raise StartupError("A worker needs redis_url: the Valkey that its servers use.")
        self.settings = settings
        self.url = settings.redis_url
        self.stopping = False
        self.tally = WorkerMetrics(settings.base_id)
        self._over = threading.Event()
        self._command = command
        self._name = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"

    def work(self) -> None:
        """Until SIGTERM or SIGINT. Valkey's absence is waited out. Raises StartupError."""
        asyncio.run(self._prove())
        global _worker  # rq calls `run` by its name alone
        _worker = self
        if self.settings.metrics_port:
            self._show(self.settings.metrics_host, self.settings.metrics_port)
        sweeping = threading.Thread(target=self._sweep, name="sweep", daemon=True)
        sweeping.start()
        with worker_dir(self.settings.data_dir.absolute() / "finetune", self._name) as self._folder:
            while not self.stopping:
                try:
                    _Calls(self).work(logging_level="WARNING")
                except RedisError as error:
                    log.warning("Valkey does not answer: %s", error)
                if not self.stopping:
                    time.sleep(AGAIN_SECONDS)
        self._over.set()
        sweeping.join(FAREWELL_SECONDS)

    async def attempt(self, id_: str) -> None:
        """Train the job, if it is there to be trained. Raises StoreError; the job is safe then as well."""
        redis, queue = connect(self.url), WorkerQueue(self.url)
        try:
            jobs = Jobs(redis, queue)
            name = f"{self._name}-{uuid.uuid4().hex}"
            with attempt_dir(self._folder, id_) as folder:  # first: a disk without room takes no job
                job = await retry_on_outage(lambda: jobs.take(id_, name), TAKE_SECONDS, lambda: self.stopping)
                if job is None:
                    log.info("Job %s: not waiting for a worker", id_)
                    return
                attempt = Attempt(
                    jobs,
                    job,
                    command=self._command,
                    environment=self._environment(),
                    folder=folder,
                    disk_bytes=self.settings.max_training_disk_bytes,
                    stopping=lambda: self.stopping,
                    tally=self.tally,
                )
                await attempt.run()
        finally:
            queue.close()
            await redis.aclose()

    async def _prove(self) -> None:
        """That the servers of this Valkey use the same store. Raises StartupError."""
        redis = connect(self.url)
        try:
            objects = Objects.open(self.settings.store_url, self.settings.store_config)
            await prove_identity_in_time(redis, objects)
        finally:
            await redis.aclose()

    def _environment(self) -> dict[str, str]:
        """The child ends with this process, and reaches no hub. The stores' secrets go nowhere else."""
        told = self.settings.model_copy(update={"supervisor_pid": os.getpid()})
        return child_environment(told) | OFFLINE | SPINS

    def _show(self, host: str, port: int) -> None:
        """Its own /metrics; without them it works as well."""
        try:
            self.tally.serve(host, port)
        except StartupError as error:
            log.error("No figures: %s", error.message)

    async def _tell(self, redis: AsyncRedis) -> None:
        """Everybody what this worker does, for their figures. Raises StoreError."""
        news = self.tally.news()
        worker = self._name.rpartition("-")[2]
        await report(redis, worker, self.tally.busy, self.tally.loss, news)
        self.tally.told(news)

    def _sweep(self) -> None:
        asyncio.run(self._sweep_for_ever())

    async def _sweep_for_ever(self) -> None:
        jobs = Jobs(redis := connect(self.url), WorkerQueue(self.url))
        objects = Objects.open(self.settings.store_url, self.settings.store_config)
        objects.on_call = self.tally.store.on_call
        doomed = ScheduledDeletes(redis, objects)
        while not self._over.is_set():
            try:
                await jobs.sweep()
                await doomed.sweep()
                await self._tell(redis)
            except StoreError as error:
                log.warning("No sweep: %s", error.message)
            except Exception:  # the sweep is what nobody else does for a lost job: it never ends
                log.exception("The sweep failed")
            self._over.wait(SWEEP_SECONDS)  # nothing else is on this loop
        try:
            await self._tell(redis)  # how the last job went
        except StoreError as error:
            log.warning("The last figures are lost: %s", error.message)


class _NoTimeLimit(BaseDeathPenalty):
    """rq would raise in the middle of a job; `Attempt` keeps the time."""

    def setup_death_penalty(self) -> None:
        pass

    def cancel_death_penalty(self) -> None:
        pass


class _Calls(SimpleWorker):
    """rq's worker, which calls `run` in this process. It takes orders from signals only."""

    death_penalty_class = _NoTimeLimit
    max_connection_wait_time = 5.0

    def __init__(self, worker: Worker) -> None:
        connection = Redis.from_url(
            worker.url, socket_connect_timeout=CONNECT_SECONDS, health_check_interval=30
        )
        super().__init__(
            [NAME],
            connection=connection,
            serializer=JSONSerializer,
            worker_ttl=RQ_SECONDS,
            log_job_description=False,
        )
        self.log_result_lifespan = False
        self._worker = worker

    def dequeue_job_and_maintain_ttl(self, *args: Any, **options: Any) -> Any:
        """rq's own worker quits when Valkey is too slow to answer; this one asks again."""
        while True:
            try:
                return super().dequeue_job_and_maintain_ttl(*args, **options)
            except TimeoutError:
                log.warning("Valkey was too slow to answer; asking for jobs again")

    def subscribe(self) -> None:
        """No orders over Valkey: rq's thread for them would end at an outage."""

    def request_stop(self, signum: int, frame: FrameType | None) -> None:  # noqa: ARG002 - a signal handler
        """A job that runs is told by `stopping`, and saves; rq's own way asks Valkey, which may be gone."""
        self._worker.stopping = self._stop_requested = True
        if self.get_state() != WorkerStatus.BUSY:
            raise StopRequested

    def request_force_stop(self, signum: int, frame: FrameType | None) -> None:
        self.request_stop(signum, frame)


_worker: Worker | None = None


def run(job: str) -> None:
    """What a call calls (see `queue`). How the job went stands in its record, not here."""
    assert _worker is not None, "rq runs in a process that is no worker of ours"
    try:
        asyncio.run(_worker.attempt(job))
    except StoreError as error:
        log.warning("Job %s: left to whoever sweeps: %s", job, error.message)
    except OSError as error:
        log.warning("Job %s: left to whoever sweeps: %s", job, error.strerror)
    except Exception:
        log.exception("Job %s: the worker failed; left to whoever sweeps", job)


def serve(settings: Settings) -> None:
    Worker(settings).work()
