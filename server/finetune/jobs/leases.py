"""A worker's side of a job: take it, send heartbeats while it trains, report how it ended.

A worker acts under the fencing token (`fence`) that `take` gave it, and every transition of the job raises
the token. So of all workers that ever had a job exactly one gets True from `trained`, and none that lost the
job can change it. An expired lease alone loses nothing: until another worker takes the job, the next call
under the old token renews the lease.
"""

from typing import Any, Literal

import msgspec

from adapters_store.valkey import store_errors
from server.finetune.jobs import transitions_lua as lua
from server.finetune.jobs.job import (
    Checkpoint,
    ControlSignal,
    Job,
    JobError,
    Progress,
    TrainingResult,
    new_event,
)
from server.finetune.jobs.keys import LEASES, QUEUED
from server.finetune.jobs.record_store import JobRecords, decode_job

LEASE_SECONDS = 45.0  # time for three heartbeats, each of which may have to wait for Valkey
WAKE_AGAIN_SECONDS = 30.0
MAX_ATTEMPTS = 5  # without a new checkpoint between them
WORKER_LOST = JobError(
    "worker_lost", f"The training's worker was lost {MAX_ATTEMPTS} times without new progress."
)


class Leases(JobRecords):
    """The worker's transitions of a job. All calls raise StoreError."""

    async def take(self, id_: str, worker: str) -> Job | None:
        """Lease the job: its record with the new `fence`, or None if it is not waiting for a worker.

        `worker` must be unique to this attempt (contain a uuid). The holder then calls `heartbeat` at least
        every LEASE_SECONDS / 3; otherwise the job goes to another worker.
        """
        event = new_event("info", "Fine-tuning job started.")
        answer = await self._run(lua.TAKE, id_, worker, int(LEASE_SECONDS * 1000), event)
        return decode_job(dict(zip(answer[::2], answer[1::2], strict=True))) if answer else None

    async def heartbeat(self, id_: str, fence: int, progress: Progress | None = None) -> ControlSignal:
        """Renew the lease, store the progress, and return what the worker is to do.

        After "lost" and "cancel" every other call under this fence is refused.
        """
        fields = msgspec.to_builtins(progress) if progress else {}
        pairs = [part for field in fields.items() if field[1] is not None for part in field]
        answer = await self._run(lua.HEARTBEAT, id_, fence, int(LEASE_SECONDS * 1000), *pairs)
        return answer.decode()  # type: ignore[no-any-return]  # what the script returns

    async def add_event(self, id_: str, fence: int, event: bytes) -> bool:
        """Append an event that `new_event` made.

        False, and nothing is written, if the fence is stale; so for all methods below.
        """
        return bool(await self._run(lua.EVENT, id_, fence, event))

    async def checkpoint(self, id_: str, fence: int, checkpoint: Checkpoint) -> bool:
        """Record a checkpoint whose files are stored. It replaces an earlier one of the same step.

        A step higher than any before is progress: the count of attempts starts again at 0.
        """
        record = msgspec.json.encode(checkpoint)
        return bool(await self._run(lua.CHECKPOINT, id_, fence, checkpoint.step, record))

    async def release(self, id_: str, fence: int) -> Literal["queued", "paused", "lost"]:
        """Give up the lease: the job is paused if that was requested, otherwise queued for another worker.

        It does not count as an attempt.
        """
        queued = new_event("info", "The worker stops; the job goes on elsewhere from its last checkpoint.")
        answer = await self._run(lua.RELEASE, id_, fence, queued, new_event("info", "The job is paused."))
        if answer == b"queued":
            await self._wake_worker(id_, 0)
        return answer.decode()  # type: ignore[no-any-return]  # what the script returns

    async def trained(self, id_: str, fence: int, result: TrainingResult) -> bool:
        """Hand the job, whose result files are stored, to the publisher. True again if called again."""
        event = new_event("info", "Training is finished; the new version is being checked and published.")
        record = msgspec.json.encode(result)
        steps, tokens = result.steps, result.trained_tokens
        return bool(await self._run(lua.TRAINED, id_, fence, record, steps, tokens, event))

    async def fail(
        self, id_: str, fence: int, error: JobError, *, retry: bool
    ) -> Literal["failed", "queued", "paused", "lost"]:
        """End the attempt with an error; with `retry`, another may start from the last checkpoint."""
        event = new_event("warn" if retry else "error", error.message)
        record = msgspec.json.encode(error)
        answer = await self._run(lua.FAIL, id_, fence, "1" if retry else "", MAX_ATTEMPTS, record, event)
        if answer == b"queued":
            await self._wake_worker(id_, 0)
        return answer.decode()  # type: ignore[no-any-return]  # what the script returns

    async def sweep(self) -> None:
        """Queue the jobs whose lease has expired, and wake workers for queued jobs that none has taken.

        Every worker and every API process calls this every few seconds.
        """
        with store_errors():
            expired: Any = await self._redis.zrange(LEASES, 0, await self._now(), byscore=True)
        for id_ in expired:
            event = new_event(
                "warn", "The training's worker seems lost; the next one goes on from the last checkpoint."
            )
            await self._run(lua.LAPSE, id_.decode(), MAX_ATTEMPTS, msgspec.json.encode(WORKER_LOST), event)
        with store_errors():
            queued: Any = await self._redis.zrange(QUEUED, 0, -1)
        if queued:
            in_list = await self._queue.waiting()
            for id_ in (id_.decode() for id_ in queued):
                if id_ not in in_list:
                    await self._wake_worker(id_, WAKE_AGAIN_SECONDS)
