"""One attempt at a job: a child process that trains, kept on its lease, steered and bounded from outside.

The child says itself how it ended, under its fence. What it cannot say, because it was stopped or has died,
is said here.
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
from server.finetune.jobs.job import Job, Wish
from server.finetune.jobs.leases import Leases
from server.finetune.worker.job_errors import crashed, ending, too_large, too_long
from server.finetune.worker.metrics import WorkerMetrics
from server.finetune.worker.resource_limits import oom_kills
from server.finetune.worker.retry import retry_on_outage
from server.finetune.worker.work_dirs import bytes_in

SAVED = 75  # exit status of a child that was asked to stop: all it had is in a checkpoint (EX_TEMPFAIL)
BEAT_SECONDS = 2.0
TICK_SECONDS = 0.2
STOP_SECONDS = 7.0  # for the step that runs, and a checkpoint: a worker that was told to stop has ten seconds
LATE_SECONDS = 300.0  # the child keeps to the job's time itself; this long after, it is killed
OUTAGE_SECONDS = 3600.0  # of Valkey, for which the last word is kept
MAX_DELAY_SECONDS = 16.0  # before a job that has crashed is tried again

Reason = Literal["pause", "stop", "cancel", "lost", "time", "disk"]
KILLED: frozenset[Reason] = frozenset({"cancel", "lost", "time", "disk"})  # nothing it has is wanted

log = logging.getLogger(__name__)


class Attempt:
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
        tally: WorkerMetrics | None = None,
    ) -> None:
        """`command` gets the job's id, its fence and `folder`, where it may fill `disk_bytes`."""
        self._jobs = jobs
        self._job = job
        self._command = [*command, job.id, str(job.fence), str(folder)]
        self._environment = environment
        self._folder = folder
        self._disk_bytes = disk_bytes
        self._stopping = stopping
        self._tally = tally or WorkerMetrics("")
        self._wish: Wish = "go"
        self._used_bytes = 0
        self._reason: Reason | None = None  # why the child was asked to stop, or killed
        self._kill_at = self._ends_at = float("inf")  # time.monotonic()

    async def run(self) -> None:
        """Returns when the child is gone and the job in other hands; StoreError if nobody heard of it."""
        kills_before = oom_kills()
        # A process group of its own: Ctrl-C is the worker's alone, and a kill reaches all of the child.
        process = await asyncio.create_subprocess_exec(
            *self._command, env=self._environment, stdin=subprocess.DEVNULL, process_group=0
        )
        log.info("Job %s: attempt %d, process %d", self._job.id, self._job.attempts, process.pid)
        self._ends_at = time.monotonic() + self._job.recipe.max_seconds + LATE_SECONDS
        self._tally.begin(self._folder)
        beside = [asyncio.create_task(work) for work in (self._beat(), self._measure())]
        status = None
        try:
            status = await self._watch(process)
            log.info("Job %s: the process %s", self._job.id, ending(status))
            await self._conclude(status, oom_kills() > kills_before)
        finally:
            for task in beside:
                task.cancel()
            _signal(process, signal.SIGKILL)
            try:
                await process.wait()
            finally:
                self._tally.end(self._outcome(status))

    async def _beat(self) -> None:
        """Keep the lease and learn what is wished; for ever."""
        while True:
            try:
                self._wish = await self._jobs.beat(self._job.id, self._job.fence)
                self._tally.beat(heard=True)
            except StoreError as error:  # nobody else can take the job meanwhile either
                self._tally.beat(heard=False)
                log.warning("Job %s: no heartbeat: %s", self._job.id, error.message)
            await asyncio.sleep(BEAT_SECONDS)

    async def _measure(self) -> None:
        """Count what the child has written; for ever. A slow disk delays no beat."""
        while True:
            with suppress(OSError):
                self._used_bytes = await asyncio.to_thread(bytes_in, self._folder)
            await asyncio.sleep(BEAT_SECONDS)

    async def _watch(self, process: Process) -> int:
        """The child's exit status, as subprocess has it."""
        ended = asyncio.create_task(process.wait())
        while not ended.done():
            await asyncio.wait({ended}, timeout=TICK_SECONDS)
            self._steer(process)
        return ended.result()

    def _steer(self, process: Process) -> None:
        now, reason = time.monotonic(), self._why()
        if reason is not None and (self._reason is None or (reason in KILLED and self._reason not in KILLED)):
            log.info("Job %s: the process is to end: %s", self._job.id, reason)
            if self._reason is None and reason not in KILLED:
                _signal(
                    process, signal.SIGTERM
                )  # a pause waits for the step that runs, however long it takes
            self._reason = reason
        if self._reason is not None and self._stopping():
            self._kill_at = min(self._kill_at, now + STOP_SECONDS)
        if self._reason in KILLED or now > self._kill_at:
            _signal(process, signal.SIGKILL)

    def _why(self) -> Reason | None:
        if self._wish in ("cancel", "lost"):
            return self._wish
        if time.monotonic() > self._ends_at:
            return "time"
        if self._used_bytes > self._disk_bytes:
            return "disk"
        if self._stopping():
            return "stop"
        return "pause" if self._wish == "pause" else None

    async def _conclude(self, status: int, out_of_memory: bool) -> None:
        """Say what the child did not. Once it has said how it ended, its fence is stale and this is void."""
        id_, fence = self._job.id, self._job.fence
        match self._reason:
            case "cancel" | "lost":
                return
            case "time":
                error = too_long(self._job.recipe.max_seconds)
                await self._say(lambda: self._jobs.fail(id_, fence, error, retry=False))
            case "disk":
                error = too_large(self._disk_bytes)
                await self._say(lambda: self._jobs.fail(id_, fence, error, retry=False))
            case None if status not in (0, SAVED):
                error = crashed(status, out_of_memory)
                await self._delay()
                await self._say(lambda: self._jobs.fail(id_, fence, error, retry=True))
            case None if status == 0:
                return
            case _:  # one killed for being slow to save goes on from an older checkpoint
                await self._say(lambda: self._jobs.release(id_, fence))

    def _outcome(self, status: int | None) -> str:
        """How figures call the attempt's end."""
        if self._reason in KILLED:
            return str(self._reason)
        ends = {0: "finished", SAVED: "saved", None: "other"}
        return ends.get(status, "crashed" if self._reason is None else "saved")

    async def _say(self, call: Callable[[], Awaitable[str]]) -> None:
        log.info("Job %s: %s", self._job.id, await retry_on_outage(call, OUTAGE_SECONDS, self._stopping))

    async def _delay(self) -> None:
        """A fault that comes back at once shall not use up all attempts in a second. The lease is kept."""
        seconds = min(2 ** (self._job.attempts - 1) - 1, MAX_DELAY_SECONDS)
        for _ in range(round(seconds / TICK_SECONDS)):
            if self._wish in ("cancel", "lost") or self._stopping():
                return
            await asyncio.sleep(TICK_SECONDS)


def _signal(process: Process, number: signal.Signals) -> None:
    """To the child and all it has started. Not once it is reaped: its number may be somebody else's then."""
    if process.returncode is None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
