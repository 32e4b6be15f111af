"""Fine-tuning jobs in Valkey: what a tenant asks for, on top of what workers and publishers do.

Every change is one script of `job_scripts`: whole or not at all, and as good as once when it runs twice.
"""

import hashlib
import secrets
from typing import NamedTuple

import msgspec
from redis.asyncio import Redis

from adapters_store.valkey import store_errors, text
from server.errors import Conflict, InvalidField, NotFound, QuotaExceeded, shown
from server.finetune.jobs import transitions_lua as lua
from server.finetune.jobs.job import FixedPart, Job, new_event
from server.finetune.jobs.leases import Leases
from server.finetune.jobs.record_store import Publications, decode_job, key

MAX_KEPT = 1000  # jobs of a tenant; the oldest that are done are forgotten
SAME_SECONDS = 24 * 3600  # an idempotency key's life
TENANT = "pp:jobs:"
PREFIX = "ftjob-"


class Same(NamedTuple):
    """An idempotency key, and what makes two requests the same."""

    key: str
    fingerprint: str  # without spaces


class Jobs(Leases, Publications):
    def __init__(self, redis: Redis, max_active: int = 16) -> None:
        super().__init__(redis)
        self._max_active = max_active

    async def create(self, fixed: FixedPart, same: Same | None = None, *events: bytes) -> Job:
        """Write the job down and wake a worker. With a known `same`, the job that it made before.

        Raises QuotaExceeded over the cap on active jobs, InvalidField for a key of another request.
        """
        key, fingerprint = (_digest(same.key), same.fingerprint) if same else ("", "")
        answer = await self._run(
            lua.CREATE,
            fixed.id,
            fixed.tenant,
            key,
            fingerprint,
            msgspec.json.encode(fixed),
            fixed.created,
            self._max_active,
            SAME_SECONDS,
            new_event("info", f"Created fine-tuning job: {fixed.id}"),
            *events,
        )
        if answer == b"quota":
            raise QuotaExceeded(f"A tenant may have {self._max_active} unfinished fine-tuning jobs.")
        if answer:
            return await self.get(fixed.tenant, _same_job(text(answer), fingerprint))
        await self._wake_worker(fixed.id, 0)
        await self._forget_oldest(fixed.tenant)
        return await self.get(fixed.tenant, fixed.id)

    async def same(self, tenant: str, same: Same) -> Job | None:
        """The job that this very request has made already. Raises InvalidField for a key of another."""
        with store_errors():
            known = await self._redis.get(f"{TENANT}{tenant}:same:{_digest(same.key)}")
        return None if known is None else await self.get(tenant, _same_job(text(known), same.fingerprint))

    async def get(self, tenant: str, id_: str) -> Job:
        """Raises NotFound, the same for an unknown job and another tenant's."""
        job = await self.find(id_) if is_job_id(id_) else None
        if job is None or job.tenant != tenant:
            raise _unknown(id_)
        return job

    async def page(self, tenant: str, after: str | None = None, limit: int = 20) -> list[Job]:
        """Newest first, those after (older than) the job `after`."""
        start = 0
        with store_errors():
            if after is not None:
                rank = await self._redis.zrevrank(f"{TENANT}{tenant}", after)
                if rank is None:
                    raise _unknown(after)
                assert isinstance(rank, int)  # without scores
                start = rank + 1
            ids = await self._redis.zrevrange(f"{TENANT}{tenant}", start, start + limit - 1)
            async with self._redis.pipeline(transaction=False) as pipeline:
                for id_ in ids:
                    pipeline.hgetall(key(text(id_)))
                found = await pipeline.execute()
        return [decode_job(fields) for fields in found if fields]

    async def unfinished(self, tenant: str) -> list[Job]:
        with store_errors():
            ids = await self._redis.smembers(f"{TENANT}{tenant}:active")
        found = [await self.find(text(id_)) for id_ in sorted(ids)]
        return [job for job in found if job is not None]

    async def cancel(self, tenant: str, id_: str) -> Job:
        """The job is cancelled when this returns; a worker that has it learns so at its next `beat`.

        Raises Conflict for a job that is over, or whose version is being published this moment.
        """
        return await self._ask(lua.CANCEL, tenant, id_, "The job has been cancelled.")

    async def pause(self, tenant: str, id_: str) -> Job:
        """A waiting job is paused at once, a running one once its worker has saved. Raises Conflict."""
        return await self._ask(lua.PAUSE, tenant, id_, "The job is being paused.")

    async def resume(self, tenant: str, id_: str) -> Job:
        """Raises Conflict for a job that is over. Nothing happens to one that is not paused."""
        job = await self._ask(lua.RESUME, tenant, id_, "The job has been resumed.")
        if job.phase == "queued":
            await self._wake_worker(id_, 0)
        return job

    async def _ask(self, script: str, tenant: str, id_: str, event: str) -> Job:
        if not is_job_id(id_):
            raise _unknown(id_)
        answer = await self._run(script, id_, tenant, new_event("info", event))
        if answer == b"unknown":
            raise _unknown(id_)
        if answer == b"publishing":
            raise Conflict(
                f"The job {shown(id_)} has been trained and is being published now; too late for that."
            )
        job = await self.get(tenant, id_)
        if answer == b"over":
            raise Conflict(f"The job {shown(id_)} has {job.status} already.")
        return job

    async def _forget_oldest(self, tenant: str) -> None:
        """Keep MAX_KEPT jobs, and those that are not done."""
        with store_errors():
            oldest = await self._redis.zrange(f"{TENANT}{tenant}", 0, -MAX_KEPT - 1)
        for id_ in oldest:
            await self._run(lua.FORGET, text(id_), tenant)


def new_job_id() -> str:
    return f"{PREFIX}{secrets.token_hex(12)}"


def is_job_id(text: str) -> bool:
    """Anything else is no key of ours to ask Valkey for."""
    return text.startswith(PREFIX) and text.isascii() and text.removeprefix(PREFIX).isalnum()


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _same_job(known: str, fingerprint: str) -> str:
    """The job behind an idempotency key's record."""
    of, _, id_ = known.partition(" ")
    if of != fingerprint:
        raise InvalidField(
            "This Idempotency-Key came with another request before; a new request needs a new key.",
            param="Idempotency-Key",
            code="idempotency_key_reused",
        )
    return id_


def _unknown(id_: str) -> NotFound:
    return NotFound(f"There is no fine-tuning job {shown(id_)}.", param="fine_tuning_job_id")
