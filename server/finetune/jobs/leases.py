"""A worker's side of a job: take it, beat while it trains, say how it ended.

A worker acts under the fence that `take` gave it, and every transition raises the fence: of all workers that
ever had a job, exactly one gets True from `trained`, and none who lost the job can change it again. A lease
that has ended is no loss before somebody else takes the job: the worker's next word renews it.
"""

from typing import Any, Literal

import msgspec

from adapters_store.valkey import store_errors
from server.finetune.jobs import transitions_lua as lua
from server.finetune.jobs.job import (
    Checkpoint,
    Job,
    JobError,
    Level,
    Progress,
    TrainingResult,
    Wish,
    new_event,
)
from server.finetune.jobs.record_store import JobRecords, decode_job

LEASE_SECONDS = 45.0  # three beats in a row, each of which waits for Valkey as long as its client does
WAKE_AGAIN_SECONDS = 30.0
MAX_ATTEMPTS = 5  # without a new checkpoint between them
LOST = JobError("worker_lost", f"The training's worker was lost {MAX_ATTEMPTS} times without new progress.")


class Leases(JobRecords):
    async def take(self, id_: str, worker: str) -> Job | None:
        """Begin to train it: the job with `fence` set, or None if it is not waiting for a worker.

        `worker` must be of this one attempt (a uuid in it). From here on `beat` at least every
        LEASE_SECONDS / 3, or somebody else gets the job.
        """
        event = new_event("info", "Fine-tuning job started.")
        answer = await self._run(lua.TAKE, id_, worker, int(LEASE_SECONDS * 1000), event)
        return decode_job(dict(zip(answer[::2], answer[1::2], strict=True))) if answer else None

    async def beat(self, id_: str, fence: int, progress: Progress | None = None) -> Wish:
        """Renew the lease and learn what to do. After "lost" and "cancel" every other call is refused."""
        fields = msgspec.to_builtins(progress) if progress else {}
        pairs = [part for field in fields.items() if field[1] is not None for part in field]
        answer = await self._run(lua.BEAT, id_, fence, int(LEASE_SECONDS * 1000), *pairs)
        return answer.decode()  # type: ignore[no-any-return]  # what the script returns

    async def event(
        self,
        id_: str,
        fence: int,
        level: Level,
        message: str,
        *,
        type: Literal["message", "metrics"] = "message",  # noqa: A002 - OpenAI's name
        data: dict[str, Any] | None = None,
    ) -> bool:
        """False, and nothing written, if the fence is stale; the same for all below."""
        return bool(await self._run(lua.EVENT, id_, fence, new_event(level, message, type, data)))

    async def checkpoint(self, id_: str, fence: int, checkpoint: Checkpoint) -> bool:
        """The files of `checkpoint` are stored. A new one of the same step replaces it.

        A step higher than any before is progress: the count of attempts begins anew.
        """
        record = msgspec.json.encode(checkpoint)
        return bool(await self._run(lua.CHECKPOINT, id_, fence, checkpoint.step, record))

    async def paused(self, id_: str, fence: int) -> bool:
        """All that is needed to go on is stored as a checkpoint."""
        return bool(await self._run(lua.PAUSED, id_, fence, new_event("info", "The job is paused.")))

    async def release(self, id_: str, fence: int) -> Literal["queued", "paused", "lost"]:
        """Give the job back: to nobody if a pause is wished, otherwise to the next worker. Not an attempt."""
        queued = new_event("info", "The worker stops; the job goes on elsewhere from its last checkpoint.")
        answer = await self._run(lua.RELEASE, id_, fence, queued, new_event("info", "The job is paused."))
        if answer == b"queued":
            await self._wake_worker(id_, 0)
        return answer.decode()  # type: ignore[no-any-return]  # what the script returns

    async def trained(self, id_: str, fence: int, result: TrainingResult) -> bool:
        """The result's files are stored: the one way to a publication. True again if called again."""
        event = new_event("info", "Training is finished; the new version is being checked and published.")
        record = msgspec.json.encode(result)
        steps, tokens = result.steps, result.trained_tokens
        return bool(await self._run(lua.TRAINED, id_, fence, record, steps, tokens, event))

    async def fail(
        self, id_: str, fence: int, error: JobError, *, retry: bool
    ) -> Literal["failed", "queued", "paused", "lost"]:
        """`retry`: the next attempt may go better, and begins from the last checkpoint."""
        event = new_event("warn" if retry else "error", error.message)
        record = msgspec.json.encode(error)
        answer = await self._run(lua.FAIL, id_, fence, "1" if retry else "", MAX_ATTEMPTS, record, event)
        if answer == b"queued":
            await self._wake_worker(id_, 0)
        return answer.decode()  # type: ignore[no-any-return]  # what the script returns

    async def sweep(self) -> None:
        """Take jobs back from workers whose lease has lapsed, and wake workers for jobs that none came for.

        Every worker and every API does this every few seconds.
        """
        with store_errors():
            lapsed: Any = await self._redis.zrange("pp:jobs:leases", 0, await self._now(), byscore=True)
        for id_ in lapsed:
            event = new_event(
                "warn", "The training's worker seems lost; the next one goes on from the last checkpoint."
            )
            await self._run(lua.LAPSE, id_.decode(), MAX_ATTEMPTS, msgspec.json.encode(LOST), event)
        with store_errors():
            waiting: Any = await self._redis.zrange("pp:jobs:queued", 0, -1)
        if waiting:
            pushed = await self._queue.waiting()
            for id_ in (id_.decode() for id_ in waiting):
                if id_ not in pushed:
                    await self._wake_worker(id_, WAKE_AGAIN_SECONDS)
