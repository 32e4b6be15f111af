"""Fine-tuning jobs in Valkey: the tenant's calls, on top of those of workers and publishers.

Every change is one script of transitions_lua.py: atomic and idempotent.
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
from server.finetune.jobs.keys import job_key, tenant_key
from server.finetune.jobs.leases import Leases
from server.finetune.jobs.record_store import Publications, decode_job
from server.tenancy.limits import LimitsOf, unlimited

MAX_JOBS_KEPT = 1000  # records of a tenant; above this the oldest of ended jobs are deleted
IDEMPOTENCY_SECONDS = 24 * 3600  # the life of an idempotency key
PREFIX = "ftjob-"
NO_LIMIT = 2**53


class IdempotencyKey(NamedTuple):
    """A tenant's key for a request that may come twice."""

    key: str
    fingerprint: str  # hash of the request's content, without spaces


class Jobs(Leases, Publications):
    """All calls on jobs. All raise StoreError when Valkey does not answer."""

    def __init__(self, redis: Redis, limits_of: LimitsOf = unlimited) -> None:
        super().__init__(redis)
        self._limits_of = limits_of

    async def create(
        self, fixed: FixedPart, idempotency: IdempotencyKey | None = None, *events: bytes
    ) -> Job:
        """Store the job and its first events, and wake a worker. With a known key, return the key's job.

        It takes all tokens that it may train on from the day's; those that are left at its end go back.
        Raises QuotaExceeded over the tenant's limits, InvalidField if the key came with another request.
        """
        limits = await self._limits_of(fixed.tenant)
        tokens = fixed.data.get("training_file", {}).get("tokens", 0) * fixed.recipe.n_epochs
        key, fingerprint = ("", "")
        if idempotency:
            key, fingerprint = _digest(idempotency.key), idempotency.fingerprint
        answer = await self._run(
            lua.CREATE,
            fixed.id,
            fixed.tenant,
            key,
            fingerprint,
            msgspec.json.encode(fixed),
            fixed.created,
            NO_LIMIT if limits.jobs is None else limits.jobs,
            IDEMPOTENCY_SECONDS,
            tokens,
            NO_LIMIT if limits.training_tokens_per_day is None else limits.training_tokens_per_day,
            new_event("info", f"Created fine-tuning job: {fixed.id}"),
            *events,
        )
        if answer == b"quota":
            raise QuotaExceeded(f"A tenant may have {limits.jobs} unfinished fine-tuning jobs.")
        if answer[:7] == b"tokens ":
            raise QuotaExceeded(
                f"A tenant may train on {limits.training_tokens_per_day} tokens a day (UTC): the jobs of "
                f"today take {text(answer[7:])}, and this one would take {tokens}.",
                param="training_file",
            )
        if answer:
            return await self.get(fixed.tenant, _same_job(text(answer), fingerprint))
        await self._wake_worker(fixed.id, 0)
        await self._forget_oldest(fixed.tenant)
        return await self.get(fixed.tenant, fixed.id)

    async def find_same(self, tenant: str, idempotency: IdempotencyKey) -> Job | None:
        """The job that an earlier request with this key made, if any.

        Raises InvalidField if that request had another content.
        """
        with store_errors():
            record = await self._redis.get(f"{tenant_key(tenant)}:same:{_digest(idempotency.key)}")
        if record is None:
            return None
        return await self.get(tenant, _same_job(text(record), idempotency.fingerprint))

    async def get(self, tenant: str, id_: str) -> Job:
        """Raises NotFound, the same for an unknown job and another tenant's."""
        job = await self.find(id_) if is_job_id(id_) else None
        if job is None or job.tenant != tenant:
            raise _unknown(id_)
        return job

    async def page(self, tenant: str, after: str | None = None, limit: int = 20) -> list[Job]:
        """Up to `limit` jobs, newest first, starting behind the job `after`. Raises NotFound for that."""
        start = 0
        with store_errors():
            if after is not None:
                rank = await self._redis.zrevrank(tenant_key(tenant), after)
                if rank is None:
                    raise _unknown(after)
                assert isinstance(rank, int)  # without scores
                start = rank + 1
            ids = await self._redis.zrevrange(tenant_key(tenant), start, start + limit - 1)
            async with self._redis.pipeline(transaction=False) as pipeline:
                for id_ in ids:
                    pipeline.hgetall(job_key(text(id_)))
                records = await pipeline.execute()
        return [decode_job(fields) for fields in records if fields]

    async def unfinished(self, tenant: str) -> list[Job]:
        """The tenant's jobs that have not ended, by id."""
        with store_errors():
            ids = await self._redis.smembers(f"{tenant_key(tenant)}:active")
        jobs = [await self.find(text(id_)) for id_ in sorted(ids)]
        return [job for job in jobs if job is not None]

    async def cancel(self, tenant: str, id_: str) -> Job:
        """The job is cancelled when this returns; its worker learns so at its next heartbeat.

        Raises NotFound, and Conflict for a job that has ended or whose version is being published.
        """
        return await self._request(lua.CANCEL, tenant, id_, "The job has been cancelled.")

    async def pause(self, tenant: str, id_: str) -> Job:
        """A queued job is paused at once, a running one when its worker has saved a checkpoint.

        Raises NotFound, and Conflict for a job that has ended or is being published.
        """
        return await self._request(lua.PAUSE, tenant, id_, "The job is being paused.")

    async def resume(self, tenant: str, id_: str) -> Job:
        """Queue a paused job again; no change to one that is not paused.

        Raises NotFound, and Conflict for a job that has ended.
        """
        job = await self._request(lua.RESUME, tenant, id_, "The job has been resumed.")
        if job.phase == "queued":
            await self._wake_worker(id_, 0)
        return job

    async def _request(self, script: str, tenant: str, id_: str, event: str) -> Job:
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
        """Delete the records of ended jobs above MAX_JOBS_KEPT."""
        with store_errors():
            oldest = await self._redis.zrange(tenant_key(tenant), 0, -MAX_JOBS_KEPT - 1)
        for id_ in oldest:
            await self._run(lua.FORGET, text(id_), tenant)


def new_job_id() -> str:
    return f"{PREFIX}{secrets.token_hex(12)}"


def is_job_id(text: str) -> bool:
    """Whether `text` has the form of a job id; nothing else becomes part of a Valkey key."""
    return text.startswith(PREFIX) and text.isascii() and text.removeprefix(PREFIX).isalnum()


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _same_job(record: str, fingerprint: str) -> str:
    """The job id in an idempotency key's record, "FINGERPRINT JOB". Raises InvalidField for another one."""
    known_fingerprint, _, id_ = record.partition(" ")
    if known_fingerprint != fingerprint:
        raise InvalidField(
            "This Idempotency-Key came with another request before; a new request needs a new key.",
            param="Idempotency-Key",
            code="idempotency_key_reused",
        )
    return id_


def _unknown(id_: str) -> NotFound:
    return NotFound(f"There is no fine-tuning job {shown(id_)}.", param="fine_tuning_job_id")
