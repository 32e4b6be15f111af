"""One attempt at a job: a child process that trains, while this process keeps the lease and bounds the child.

The child reports its own outcome, under its fence. The worker reports for a child that was stopped or died.
"""

import asyncio
import logging
import os
import signal
import subprocess
import time
from asyncio.subprocess import Process
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Literal

from server.errors import StoreError
from server.finetune.jobs.job import ControlSignal, Job
from server.finetune.jobs.leases import Leases
from server.finetune.worker.job_errors import crashed, describe_exit, too_large, too_long
from server.finetune.worker.metrics import WorkerMetrics
from server.finetune.worker.resource_limits import oom_kills
from server.finetune.worker.retry import retry_on_outage
from server.finetune.worker.work_dirs import bytes_in

EXIT_SAVED = 75  # exit status of a child that was told to stop and has saved a checkpoint (EX_TEMPFAIL)
HEARTBEAT_SECONDS = 2.0
POLL_SECONDS = 0.2
SAVE_SECONDS = 7.0  # for the running step and a checkpoint: a worker that was told to stop has ten seconds
OVERTIME_SECONDS = 300.0  # the child ends itself after the job's max_seconds; this much later it is killed
OUTAGE_SECONDS = 3600.0  # the longest outage of Valkey over which the outcome is still reported
MAX_DELAY_SECONDS = 16.0  # before a crashed job is queued again

Reason = Literal["pause", "stop", "cancel", "lost", "time", "disk"]
KILL_REASONS: frozenset[Reason] = frozenset({"cancel", "lost", "time", "disk"})  # no checkpoint is needed

log = logging.getLogger(__name__)


class Attempt:
    """A running child process, its lease and its limits; `run` returns when it is over."""

    def __init__(
        self,
        jobs: Leases,
        job: Job,
        *,
        command: Sequence[str],
        environment: Mapping[str, str],
        folder: Path,
        disk_bytes: int,
        stopping: Callable[[], bool],
        metrics: WorkerMetrics | None = None,
    ) -> None:
        """`command` is called with the job's id, its fence and `folder`, where it may write `disk_bytes`."""
        self._jobs = jobs
        self._job = job
        self._command = [*command, job.id, str(job.fence), str(folder)]
        self._environment = environment
        self._folder = folder
        self._disk_bytes = disk_bytes
        self._stopping = stopping
        self._metrics = metrics or WorkerMetrics("")
        self._signal: ControlSignal = "go"  # of the last heartbeat
        self._used_bytes = 0
        self._reason: Reason | None = None  # why the child was told to stop or killed
        self._kill_at = self._ends_at = float("inf")  # time.monotonic()

    async def run(self) -> None:
        """Returns when the child has ended and the outcome is reported. Raises StoreError if it cannot be."""
        kills_before = oom_kills()
        # A process group of its own: Ctrl-C reaches the worker only, and a kill the child's children too.
        process = await asyncio.create_subprocess_exec(
            *self._command, env=self._environment, stdin=subprocess.DEVNULL, process_group=0
        )
        log.info("Job %s: attempt %d, process %d", self._job.id, self._job.attempts, process.pid)
        self._ends_at = time.monotonic() + self._job.recipe.max_seconds + OVERTIME_SECONDS
        self._metrics.begin(self._folder)
        tasks = [asyncio.create_task(loop) for loop in (self._send_heartbeats(), self._measure_disk())]
        status = None
        try:
            status = await self._supervise(process)
            log.info("Job %s: the process %s", self._job.id, describe_exit(status))
            await self._report_outcome(status, oom_kills() > kills_before)
        finally:
            for task in tasks:
                task.cancel()
            _send_signal(process, signal.SIGKILL)
            try:
                await process.wait()
            finally:
                self._metrics.end(self._outcome(status))

    async def _send_heartbeats(self) -> None:
        """Renew the lease and read the control signal, until cancelled."""
        while True:
            try:
                self._signal = await self._jobs.heartbeat(self._job.id, self._job.fence)
                self._metrics.heartbeat(answered=True)
            except StoreError as error:  # in an outage no other worker can take the job either
                self._metrics.heartbeat(answered=False)
                log.warning("Job %s: no heartbeat: %s", self._job.id, error.message)
            await asyncio.sleep(HEARTBEAT_SECONDS)

    async def _measure_disk(self) -> None:
        """Count the bytes that the child has written, until cancelled. A slow disk delays no heartbeat."""
        while True:
            with suppress(OSError):
                self._used_bytes = await asyncio.to_thread(bytes_in, self._folder)
            await asyncio.sleep(HEARTBEAT_SECONDS)

    async def _supervise(self, process: Process) -> int:
        """Stop the child as soon as there is a reason; its exit status, as subprocess has it."""
        ended = asyncio.create_task(process.wait())
        while not ended.done():
            await asyncio.wait({ended}, timeout=POLL_SECONDS)
            self._stop_if_needed(process)
        return ended.result()

    def _stop_if_needed(self, process: Process) -> None:
        """SIGTERM once for a pause or a stop, SIGKILL for the other reasons and when a stop takes too long.

        A pause waits for the running step, however long it takes.
        """
        now, reason = time.monotonic(), self._stop_reason()
        more_urgent = self._reason is None or (reason in KILL_REASONS and self._reason not in KILL_REASONS)
        if reason is not None and more_urgent:
            log.info("Job %s: the process is to end: %s", self._job.id, reason)
            if self._reason is None and reason not in KILL_REASONS:
                _send_signal(process, signal.SIGTERM)
            self._reason = reason
        if self._reason is not None and self._stopping():
            self._kill_at = min(self._kill_at, now + SAVE_SECONDS)
        if self._reason in KILL_REASONS or now > self._kill_at:
            _send_signal(process, signal.SIGKILL)

    def _stop_reason(self) -> Reason | None:
        if self._signal in ("cancel", "lost"):
            return self._signal
        if time.monotonic() > self._ends_at:
            return "time"
        if self._used_bytes > self._disk_bytes:
            return "disk"
        if self._stopping():
            return "stop"
        return "pause" if self._signal == "pause" else None

    async def _report_outcome(self, status: int, out_of_memory: bool) -> None:
        """Report the outcome on the child's behalf.

        No effect if the child already did: its fence is stale.
        """
        id_, fence = self._job.id, self._job.fence
        match self._reason:
            case "cancel" | "lost":
                return
            case "time":
                error = too_long(self._job.recipe.max_seconds)
                await self._report(lambda: self._jobs.fail(id_, fence, error, retry=False))
            case "disk":
                error = too_large(self._disk_bytes)
                await self._report(lambda: self._jobs.fail(id_, fence, error, retry=False))
            case None if status not in (0, EXIT_SAVED):
                error = crashed(status, out_of_memory)
                await self._back_off()
                await self._report(lambda: self._jobs.fail(id_, fence, error, retry=True))
            case None if status == 0:
                return
            case _:  # also a child that was killed before it had saved: it resumes from an older checkpoint
                await self._report(lambda: self._jobs.release(id_, fence))

    def _outcome(self, status: int | None) -> str:
        """The attempt's outcome as a label of metrics."""
        if self._reason in KILL_REASONS:
            return str(self._reason)
        outcomes = {0: "finished", EXIT_SAVED: "saved", None: "other"}
        return outcomes.get(status, "crashed" if self._reason is None else "saved")

    async def _report(self, call: Callable[[], Awaitable[str]]) -> None:
        log.info("Job %s: %s", self._job.id, await retry_on_outage(call, OUTAGE_SECONDS, self._stopping))

    async def _back_off(self) -> None:
        """Delay the report of a crash, so that a persistent fault does not use up all attempts at once.

        Heartbeats keep the lease meanwhile.
        """
        seconds = min(2 ** (self._job.attempts - 1) - 1, MAX_DELAY_SECONDS)
        for _ in range(round(seconds / POLL_SECONDS)):
            if self._signal in ("cancel", "lost") or self._stopping():
                return
            await asyncio.sleep(POLL_SECONDS)


def _send_signal(process: Process, number: signal.Signals) -> None:
    """Signal the child's process group; not once the child is reaped, as its id may be in use again then."""
    if process.returncode is None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
