"""The list in Valkey that wakes idle workers. It holds job ids; what is to be done, the job's record says.

Workers take from its right. An entry may be lost with the worker that took it, and a job may have two: taking
a job is exclusive by its lease (see leases.py), and `sweep` pushes a job again that waits and has no entry.

Before this list there was an rq queue. Keys `rq:*` that are still in a Valkey are never read; for a job that
was enqueued there, `sweep` makes an entry here. The same holds while processes of both versions run.
"""

from redis.asyncio import Redis

from adapters_store.valkey import store_errors, text
from server.finetune.jobs.keys import WORKER_QUEUE


class WorkerQueue:
    """All calls raise StoreError."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis

    async def push(self, job: str) -> None:
        """Wake an idle worker for the job, or else the first that becomes idle."""
        with store_errors():
            await self._redis.lpush(WORKER_QUEUE, job)

    async def take(self, seconds: float) -> str | None:
        """Remove and return the oldest entry; None if there is none for `seconds`.

        The client gives up on any answer after ANSWER_SECONDS; `seconds` must be less.
        """
        with store_errors():
            entry = await self._redis.brpop([WORKER_QUEUE], timeout=seconds)
        return None if entry is None else text(entry[1])

    async def waiting(self) -> set[str]:
        """The jobs that have an entry."""
        with store_errors():
            return {text(job) for job in await self._redis.lrange(WORKER_QUEUE, 0, -1)}
