"""Figures of fine-tuning in Valkey, for whoever shows them: what workers say, how many jobs stand where.

pp:figures            hash   counter -> how much, of all workers since ever; finished:STATUS -> jobs
pp:figures:workers    hash   worker -> WorkerState, as it last said
"""

from collections.abc import Mapping
from typing import Any

import msgspec
from redis.asyncio import Redis

from adapters_store.valkey import store_errors
from server.finetune.jobs.leases import LEASE_SECONDS

COUNTERS = "pp:figures"
WORKERS = "pp:figures:workers"
GONE_SECONDS = 60.0  # a worker that has said nothing for so long is not there
MAX_WORKERS = 64  # shown


class WorkerState(msgspec.Struct, frozen=True):
    at: float  # Unix seconds
    busy: bool
    loss: float | None = None  # of the last update


class JobStats(msgspec.Struct, frozen=True):
    queued: int
    training: int
    publishing: int
    silence_seconds: float  # of the worker that was heard of longest ago, among those that have a job
    counters: dict[str, int] = {}
    workers: dict[str, WorkerState] = {}


async def job_stats(redis: Redis) -> JobStats:
    """One round trip, however many jobs there are. Raises StoreError."""
    with store_errors():
        async with redis.pipeline(transaction=True) as pipeline:
            for where in ("queued", "leases", "publishing"):
                pipeline.zcard(f"pp:jobs:{where}")
            pipeline.zrange("pp:jobs:leases", 0, 0, withscores=True)
            pipeline.time()
            pipeline.hgetall(COUNTERS)
            pipeline.hgetall(WORKERS)
            queued, training, publishing, first, time, counters, workers = await pipeline.execute()
    now = time[0] + time[1] / 1e6
    silence = LEASE_SECONDS - (first[0][1] / 1000 - now) if first else 0.0
    states = {name.decode(): msgspec.json.decode(state, type=WorkerState) for name, state in workers.items()}
    return JobStats(
        queued,
        training,
        publishing,
        max(0.0, silence),
        {key.decode(): int(value) for key, value in counters.items()},
        dict(
            sorted((name, state) for name, state in states.items() if now - state.at < GONE_SECONDS)[
                :MAX_WORKERS
            ]
        ),
    )


async def report(
    redis: Redis, worker: str, busy: bool, loss: float | None, counted: Mapping[str, int]
) -> None:
    """What a worker does, and what it has counted since it last told. Raises StoreError."""
    with store_errors():
        seconds, microseconds = await redis.time()
        now = int(seconds) + int(microseconds) / 1e6
        known: Any = await redis.hgetall(WORKERS)
        gone = [name for name, state in known.items() if now - _said_at(state) > GONE_SECONDS]
        async with redis.pipeline(transaction=True) as pipeline:
            pipeline.hset(WORKERS, worker, msgspec.json.encode(WorkerState(now, busy, loss)).decode())
            for key, amount in counted.items():
                pipeline.hincrby(COUNTERS, key, amount)
            if gone:
                pipeline.hdel(WORKERS, *gone)
            await pipeline.execute()


def _said_at(state: bytes) -> float:
    return msgspec.json.decode(state, type=WorkerState).at
