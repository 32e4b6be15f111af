"""The Watcher of a real job: what training says becomes events, progress and checkpoints, under the fence.

The thread that trains waits for checkpoints only. Everything else is sent about once a second by a task on
the portal's event loop; while Valkey is away it gathers here, and the oldest of too much is dropped.
"""

import logging
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import anyio
from anyio.from_thread import BlockingPortal

from server.errors import StoreError
from server.finetune.jobs.job import Job, Level, Progress, Wish
from server.finetune.jobs.leases import Leases
from server.finetune.training.observer import Evaluated, StepDone
from server.finetune.worker.checkpoints import Checkpoints
from server.finetune.worker.metrics import AttemptCounters
from server.finetune.worker.retry import retry_on_outage
from server.finetune.worker.work_dirs import bytes_in

SEND_SECONDS = 1.0
OUTAGE_SECONDS = 600.0  # of a store: so long a checkpoint is tried, then the attempt is over
MAX_UNSENT = 2000

log = logging.getLogger(__name__)


class _Event(NamedTuple):
    level: Level
    message: str
    type: Literal["message", "metrics"] = "message"
    data: dict[str, Any] | None = None


class Reporter:
    def __init__(
        self,
        portal: BlockingPortal,
        leases: Leases,
        checkpoints: Checkpoints,
        job: Job,
        stopping: Callable[[], bool],
        folder: Path,
    ) -> None:
        """What is trained is noted in `folder`, where the worker reads it."""
        self._portal = portal
        self._leases = leases
        self._checkpoints = checkpoints
        self._job = job
        self._stopping = stopping
        self._folder = folder
        self._trained = AttemptCounters()
        self._tokens: int | None = None  # of all attempts, before the step under way
        self._wish: Wish = "go"
        self._unsent: deque[_Event] = deque(maxlen=MAX_UNSENT)
        self._progress: Progress | None = None
        self._closing = anyio.Event()

    # from the thread that trains

    def on_step(self, done: StepDone) -> Wish:
        self._note(done)
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
        self._unsent.append(_Event("info", message, "metrics", metrics))
        if self._stopping() and self._wish == "go":
            return "pause"
        return self._wish

    def _note(self, done: StepDone) -> None:
        if self._tokens is None:  # of an earlier attempt's tokens nothing is known but their mean
            self._tokens = done.tokens - done.tokens // done.step
        self._trained.training_tokens += done.tokens - self._tokens
        self._trained.training_steps += 1
        self._trained.loss = done.loss
        self._tokens = done.tokens
        self._trained.write(self._folder)

    def on_evaluation(self, evaluated: Evaluated) -> None:
        metrics = {
            "step": evaluated.step,
            "valid_loss": evaluated.loss,
            "valid_mean_token_accuracy": evaluated.accuracy,
            "best": evaluated.best,
        }
        best = ", the best so far" if evaluated.best else ""
        message = f"Step {evaluated.step}: validation loss={evaluated.loss:.4f}{best}"
        self._unsent.append(_Event("info", message, "metrics", metrics))

    def on_checkpoint(self, folder: Path, step: int, metrics: dict[str, float]) -> None:
        """Raises StoreError after OUTAGE_SECONDS."""
        self._portal.call(self._save, folder, step, metrics)

    def on_event(self, level: Level, message: str) -> None:
        self._unsent.append(_Event(level, message))

    def close(self) -> None:
        self._portal.call(self._closing.set)

    # on the event loop

    async def report(self) -> None:
        """Returns after `close`, when all is written. Raises StoreError if it cannot be."""
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
                await self._leases.event(
                    id_, fence, event.level, event.message, type=event.type, data=event.data
                )
            except StoreError:
                self._unsent.appendleft(event)
                raise
        progress, self._progress = self._progress, None
        if progress:
            self._wish = await self._leases.beat(id_, fence, progress)

    async def _save(self, folder: Path, step: int, metrics: dict[str, float]) -> None:
        async def save() -> bool:
            self._wish = await self._leases.beat(self._job.id, self._job.fence)
            wanted = self._wish not in ("cancel", "lost")
            return wanted and await self._checkpoints.save(folder, step, metrics)

        if not await retry_on_outage(save, OUTAGE_SECONDS):
            self._wish = self._wish if self._wish == "cancel" else "lost"
            return
        self._trained.checkpoints += 1
        self._trained.checkpoint_bytes += bytes_in(folder)
        self._unsent.append(_Event("info", f"Checkpoint created at step {step}"))
        log.info("Job %s: checkpoint %d", self._job.id, step)
        await retry_on_outage(self._checkpoints.prune, OUTAGE_SECONDS)
