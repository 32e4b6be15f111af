"""A job's TrainingObserver: it records events, progress and checkpoints in Valkey, under the job's fence.

The training thread waits only for checkpoints. A task on the portal's event loop sends everything else about
once a second. During an outage of Valkey events are buffered here; above MAX_UNSENT the oldest are dropped.
"""

import logging
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

import anyio
from anyio.from_thread import BlockingPortal

from server.errors import StoreError
from server.finetune.jobs.job import ControlSignal, Job, Level, Progress, new_event
from server.finetune.jobs.leases import Leases
from server.finetune.training.observer import Evaluated, StepDone
from server.finetune.worker.checkpoints import Checkpoints
from server.finetune.worker.metrics import AttemptCounters
from server.finetune.worker.retry import retry_on_outage
from server.finetune.worker.work_dirs import bytes_in

SEND_SECONDS = 1.0
OUTAGE_SECONDS = 600.0  # of a store: after retrying a checkpoint for so long, the attempt fails
MAX_UNSENT = 2000

log = logging.getLogger(__name__)


class Reporter:
    """Passes a training's callbacks on to the job's record. Implements TrainingObserver."""

    def __init__(
        self,
        portal: BlockingPortal,
        leases: Leases,
        checkpoints: Checkpoints,
        job: Job,
        stopping: Callable[[], bool],
        folder: Path,
    ) -> None:
        """Counters are written to `folder`, where the worker reads them (see metrics.py)."""
        self._portal = portal
        self._leases = leases
        self._checkpoints = checkpoints
        self._job = job
        self._stopping = stopping
        self._folder = folder
        self._counters = AttemptCounters()
        self._tokens: int | None = None  # trained by all attempts up to the last step; None before the first
        self._signal: ControlSignal = "go"  # of the last heartbeat
        self._unsent: deque[bytes] = deque(maxlen=MAX_UNSENT)
        self._progress: Progress | None = None
        self._closing = anyio.Event()

    # called on the training thread

    def on_step(self, done: StepDone) -> ControlSignal:
        """Queue the step's event and progress; the newest control signal, or "pause" if the worker stops."""
        self._count(done)
        self._progress = Progress(
            step=done.step,
            total_steps=done.total,
            trained_tokens=done.tokens,
            estimated_finish=int(time.time() + done.seconds / done.step * (done.total - done.step)),
        )
        metrics = {
            "step": done.step,
            "total_steps": done.total,
            "train_loss": done.loss,
            "train_mean_token_accuracy": done.accuracy,
            "learning_rate": done.learning_rate,
            "grad_norm": done.grad_norm,
            "trained_tokens": done.tokens,
            "seconds": done.seconds,
        }
        message = f"Step {done.step}/{done.total}: training loss={done.loss:.4f}"
        self._unsent.append(new_event("info", message, "metrics", metrics))
        if self._stopping() and self._signal == "go":
            return "pause"
        return self._signal

    def _count(self, done: StepDone) -> None:
        if (
            self._tokens is None
        ):  # the total includes earlier attempts: take this step's share of it as the mean
            self._tokens = done.tokens - done.tokens // done.step
        self._counters.training_tokens += done.tokens - self._tokens
        self._counters.training_steps += 1
        self._counters.loss = done.loss
        self._tokens = done.tokens
        self._counters.write(self._folder)

    def on_evaluation(self, evaluated: Evaluated) -> None:
        """Queue the evaluation's event."""
        metrics = {
            "step": evaluated.step,
            "valid_loss": evaluated.loss,
            "valid_mean_token_accuracy": evaluated.accuracy,
            "best": evaluated.best,
        }
        best = ", the best so far" if evaluated.best else ""
        message = f"Step {evaluated.step}: validation loss={evaluated.loss:.4f}{best}"
        self._unsent.append(new_event("info", message, "metrics", metrics))

    def on_checkpoint(self, folder: Path, step: int, metrics: dict[str, float]) -> None:
        """Raises StoreError after OUTAGE_SECONDS."""
        self._portal.call(self._save, folder, step, metrics)

    def on_event(self, level: Level, message: str) -> None:
        self._unsent.append(new_event(level, message))

    def close(self) -> None:
        self._portal.call(self._closing.set)

    # runs on the event loop

    async def report(self) -> None:
        """Send until `close`, then the rest. Raises StoreError if that fails for OUTAGE_SECONDS."""
        while not self._closing.is_set():
            try:
                await self._send()
            except StoreError as error:
                log.warning("Job %s: not reported yet: %s", self._job.id, error.message)
            with anyio.move_on_after(SEND_SECONDS):
                await self._closing.wait()
        await retry_on_outage(self._send, OUTAGE_SECONDS)

    async def _send(self) -> None:
        id_, fence = self._job.id, self._job.fence
        while self._unsent:
            event = self._unsent.popleft()
            try:
                await self._leases.add_event(id_, fence, event)
            except StoreError:
                self._unsent.appendleft(event)
                raise
        progress, self._progress = self._progress, None
        if progress:
            self._signal = await self._leases.heartbeat(id_, fence, progress)

    async def _save(self, folder: Path, step: int, metrics: dict[str, float]) -> None:
        async def save() -> bool:
            self._signal = await self._leases.heartbeat(self._job.id, self._job.fence)
            has_job = self._signal not in ("cancel", "lost")
            return has_job and await self._checkpoints.save(folder, step, metrics)

        if not await retry_on_outage(save, OUTAGE_SECONDS):
            self._signal = self._signal if self._signal == "cancel" else "lost"
            return
        self._counters.checkpoints += 1
        self._counters.checkpoint_bytes += bytes_in(folder)
        self._unsent.append(new_event("info", f"Checkpoint created at step {step}"))
        log.info("Job %s: checkpoint %d", self._job.id, step)
        await retry_on_outage(self._checkpoints.prune, OUTAGE_SECONDS)
