"""Statistics of fine-tuning in Valkey, for the API's /metrics: jobs by phase, and what workers report."""

from collections.abc import Mapping
from typing import Any

import msgspec
from redis.asyncio import Redis

from adapters_store.valkey import store_errors
from server.finetune.jobs.keys import COUNTERS, LEASES, PUBLISHING, QUEUED, WORKERS
from server.finetune.jobs.leases import LEASE_SECONDS

WORKER_TIMEOUT_SECONDS = 60.0  # after its last report a worker counts as gone
MAX_WORKERS = 64  # in JobStats


class WorkerState(msgspec.Struct, frozen=True):
    """A worker's latest report."""

    at: float  # time of the report, Unix seconds
    busy: bool
    loss: float | None = None  # of the last update


class JobStats(msgspec.Struct, frozen=True):
    """Jobs by phase, totals of all workers, and the workers that are alive."""

    queued: int
    training: int
    publishing: int
    silence_seconds: float  # longest time since a heartbeat, over the workers that have a job
    counters: dict[str, int] = {}
    workers: dict[str, WorkerState] = {}


async def job_stats(redis: Redis) -> JobStats:
    """The statistics in one round trip, however many jobs there are. Raises StoreError."""
    with store_errors():
        async with redis.pipeline(transaction=True) as pipeline:
            for phase in (QUEUED, LEASES, PUBLISHING):
                pipeline.zcard(phase)
            pipeline.zrange(LEASES, 0, 0, withscores=True)
            pipeline.time()
            pipeline.hgetall(COUNTERS)
            pipeline.hgetall(WORKERS)
            queued, training, publishing, first_lease, time, counters, workers = await pipeline.execute()
    now = time[0] + time[1] / 1e6
    silence = LEASE_SECONDS - (first_lease[0][1] / 1000 - now) if first_lease else 0.0
    states = {name.decode(): msgspec.json.decode(state, type=WorkerState) for name, state in workers.items()}
    return JobStats(
        queued,
        training,
        publishing,
        max(0.0, silence),
        {key.decode(): int(value) for key, value in counters.items()},
        dict(
            sorted(
                (name, state) for name, state in states.items() if now - state.at < WORKER_TIMEOUT_SECONDS
            )[:MAX_WORKERS]
        ),
    )


async def report(
    redis: Redis, worker: str, busy: bool, loss: float | None, increments: Mapping[str, int]
) -> None:
    """Store a worker's state and add what it has counted since its last report; drop workers that are gone.

    Raises StoreError.
    """
    with store_errors():
        seconds, microseconds = await redis.time()
        now = int(seconds) + int(microseconds) / 1e6
        states: Any = await redis.hgetall(WORKERS)
        gone = [name for name, state in states.items() if now - _reported_at(state) > WORKER_TIMEOUT_SECONDS]
        async with redis.pipeline(transaction=True) as pipeline:
            pipeline.hset(WORKERS, worker, msgspec.json.encode(WorkerState(now, busy, loss)).decode())
            for key, amount in increments.items():
                pipeline.hincrby(COUNTERS, key, amount)
            if gone:
                pipeline.hdel(WORKERS, *gone)
            await pipeline.execute()


def _reported_at(state: bytes) -> float:
    return msgspec.json.decode(state, type=WorkerState).at
