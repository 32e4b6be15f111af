"""The job records in Valkey: what all processes read, and the publisher's transitions (Publications).

The scripts of transitions_lua.py make every change; leases.py has the worker's
transitions and jobs.py the tenant's.

A publisher claims a trained job, commits it to one version number, publishes that version and reports it. The
committed number is what makes this safe to repeat: no other version may be published for the job.
"""

import logging
from typing import Any

import msgspec
from redis.asyncio import Redis
from redis.commands.core import AsyncScript

from adapters_store.valkey import claim, store_errors, text
from server.errors import StoreError
from server.finetune.jobs import transitions_lua as lua
from server.finetune.jobs.job import Checkpoint, Event, Job, JobError, new_event
from server.finetune.jobs.keys import PUBLISHING, job_key
from server.finetune.jobs.queue import WorkerQueue

log = logging.getLogger(__name__)
CLAIM_SECONDS = 30.0
JSON_FIELDS = ("error", "result", "result_files")


class JobRecords:
    """All calls raise StoreError when Valkey does not answer; whether the change was made is then unknown."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._queue = WorkerQueue(redis)
        self._scripts: dict[str, AsyncScript] = {}

    async def find(self, id_: str) -> Job | None:
        """The job of any tenant, or None; for workers and the publisher."""
        with store_errors():
            fields: Any = await self._redis.hgetall(job_key(id_))
        return decode_job(fields) if fields else None

    async def events(
        self, id_: str, *, after: int = 0, before: int | None = None, limit: int = 20, newest: bool = False
    ) -> list[Event]:
        """Up to `limit` events with numbers between `after` and `before`, both exclusive.

        The oldest come first, with `newest` the newest.
        """
        low, high = f"({after}", "+inf" if before is None else f"({before}"
        first, last = (high, low) if newest else (low, high)
        with store_errors():
            numbered: Any = await self._redis.zrange(
                f"{job_key(id_)}:events",
                first,
                last,
                desc=newest,
                byscore=True,
                offset=0,
                num=limit,
                withscores=True,
            )
        return [
            msgspec.structs.replace(msgspec.json.decode(event, type=Event), sequence=int(number))
            for event, number in numbered
        ]

    async def checkpoints(self, id_: str) -> list[Checkpoint]:
        """All checkpoints, the highest step first; also those whose files are pruned."""
        with store_errors():
            records = await self._redis.hvals(f"{job_key(id_)}:checkpoints")
        decoded = [msgspec.json.decode(checkpoint, type=Checkpoint) for checkpoint in records]
        return sorted(decoded, key=lambda checkpoint: -checkpoint.step)

    async def _run(self, script: str, id_: str, *args: Any) -> Any:
        """Run one script of transitions_lua.py on one job."""
        if script not in self._scripts:
            self._scripts[script] = self._redis.register_script(lua.PRELUDE + script)
        with store_errors():
            return await self._scripts[script](args=[id_, *args])

    async def _now(self) -> int:
        """Valkey's clock, in milliseconds."""
        with store_errors():
            seconds, microseconds = await self._redis.time()
        return int(seconds) * 1000 + int(microseconds) // 1000

    async def _wake_worker(self, id_: str, again_after: float) -> None:
        """Wake a worker for a job that waits, unless one was woken for it within `again_after` seconds.

        The job is safe either way: `sweep` repeats a wake-up that failed.
        """
        try:
            if await self._run(lua.WAKE, id_, int(again_after * 1000)):
                await self._queue.push(id_)
        except StoreError as error:
            log.warning("No worker could be called for %s yet: %s", id_, error)


def decode_job(fields: dict[bytes, bytes]) -> Job:
    """A job's hash as a Job, without the fields that only scripts use."""
    values: dict[str, Any] = {name.decode(): value.decode() for name, value in fields.items()}
    values |= msgspec.json.decode(values["fixed"])
    values |= {name: msgspec.json.decode(values[name]) for name in JSON_FIELDS if name in values}
    values["pausing"] = values.get("pausing") == "1"
    return msgspec.convert(values, Job, strict=False)


class Publications(JobRecords):
    """The publisher's transitions of a trained job."""

    async def to_publish(self) -> list[str]:
        """The ids of all trained jobs that are not published, the oldest first."""
        with store_errors():
            return [text(id_) for id_ in await self._redis.zrange(PUBLISHING, 0, -1)]

    async def claim(self, id_: str, publisher: str) -> bool:
        """Whether this publisher may try the job for CLAIM_SECONDS.

        The claim only saves work: two publishers at once do no harm.
        """
        return await claim(self._redis, f"{job_key(id_)}:claim", publisher, CLAIM_SECONDS)

    async def report_waiting(self, id_: str, publisher: str, why: str) -> bool:
        """Drop the claim and tell the tenant why the job waits. False if the tenant knows already."""
        return bool(await self._run(lua.WAITING, id_, publisher, why, new_event("warn", why)))

    async def count_failure(self, id_: str) -> int:
        """Add one to the failed tries to publish the job; their number."""
        with store_errors():
            return int(await self._redis.hincrby(job_key(id_), "tries", 1))

    async def commit_to_version(self, id_: str, previous: int, version: int) -> int | None:
        """Commit the job to `version` if it is committed to `previous` (0: to none).

        Returns the version it is committed to now, the only one that may be published for it; None if the
        job has ended. A committed job cannot be cancelled.
        """
        answer = int(await self._run(lua.INTEND, id_, previous or "", version))
        return None if answer < 0 else answer

    async def succeed(self, id_: str, version: int, model: str, files: list[str], *events: bytes) -> bool:
        """End the job: its version is published. False if it ended otherwise: then delete the version."""
        record = msgspec.json.encode(files)
        return bool(await self._run(lua.SUCCEED, id_, version, model, record, *events))

    async def reject(self, id_: str, error: JobError) -> bool:
        """End the job as failed: its result cannot be published. False if it has ended already."""
        record = msgspec.json.encode(error)
        return bool(await self._run(lua.REJECT, id_, record, new_event("error", error.message)))
