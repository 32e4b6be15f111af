"""The job records in Valkey, as everybody reads and changes them. Knows the keys, not who may do what."""

import logging
from typing import Any, Protocol

import msgspec
from redis.asyncio import Redis
from redis.commands.core import AsyncScript

from adapters_store.valkey import store_errors
from server.errors import StoreError
from server.finetune.jobs import transitions_lua as job_scripts
from server.finetune.jobs.job import Checkpoint, Event, Job

log = logging.getLogger(__name__)
JSON_FIELDS = ("error", "result", "result_files")


class Caller(Protocol):
    """What `queue.WorkerQueue` is."""

    async def call(self, job: str) -> None: ...

    async def called(self) -> set[str]: ...


class Records:
    """All calls raise StoreError when Valkey does not answer: then nobody knows whether it happened."""

    def __init__(self, redis: Redis, queue: Caller) -> None:
        self._redis = redis
        self._queue = queue
        self._scripts: dict[str, AsyncScript] = {}

    async def find(self, id_: str) -> Job | None:
        """The job, whosever it is; for workers and the publisher."""
        with store_errors():
            fields: Any = await self._redis.hgetall(key(id_))
        return decode_job(fields) if fields else None

    async def events(
        self, id_: str, *, after: int = 0, before: int | None = None, limit: int = 20, newest: bool = False
    ) -> list[Event]:
        """Those numbered between `after` and `before`, both left out; the oldest first unless `newest`."""
        low, high = f"({after}", "+inf" if before is None else f"({before}"
        first, last = (high, low) if newest else (low, high)
        with store_errors():
            found: Any = await self._redis.zrange(
                f"{key(id_)}:events",
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
            for event, number in found
        ]

    async def checkpoints(self, id_: str) -> list[Checkpoint]:
        """The newest (highest step) first."""
        with store_errors():
            found = await self._redis.hvals(f"{key(id_)}:checkpoints")
        decoded = [msgspec.json.decode(checkpoint, type=Checkpoint) for checkpoint in found]
        return sorted(decoded, key=lambda checkpoint: -checkpoint.step)

    async def _run(self, script: str, id_: str, *args: Any) -> Any:
        """One of `job_scripts` on one job."""
        if script not in self._scripts:
            self._scripts[script] = self._redis.register_script(job_scripts.PRELUDE + script)
        with store_errors():
            return await self._scripts[script](args=[id_, *args])

    async def _now(self) -> int:
        """Valkey's clock, in milliseconds."""
        with store_errors():
            seconds, microseconds = await self._redis.time()
        return int(seconds) * 1000 + int(microseconds) // 1000

    async def _call(self, id_: str, again_after: float) -> None:
        """Call a worker for a job that waits, unless one was called within `again_after` seconds.

        The job is safe either way: a call that fails is made again by whoever sweeps.
        """
        try:
            if await self._run(job_scripts.CALL, id_, int(again_after * 1000)):
                await self._queue.call(id_)
        except StoreError as error:
            log.warning("No worker could be called for %s yet: %s", id_, error)


def key(id_: str) -> str:
    return f"pp:job:{id_}"


def decode_job(fields: dict[bytes, bytes]) -> Job:
    """A job's hash as a Job; fields that only scripts use are left out."""
    found: dict[str, Any] = {name.decode(): value.decode() for name, value in fields.items()}
    found |= msgspec.json.decode(found["fixed"])
    found |= {name: msgspec.json.decode(found[name]) for name in JSON_FIELDS if name in found}
    found["pausing"] = found.get("pausing") == "1"
    return msgspec.convert(found, Job, strict=False)
