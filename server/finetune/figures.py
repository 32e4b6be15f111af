"""Figures of fine-tuning, for whoever shows them: how many jobs stand where, how silent workers are."""

import msgspec
from redis.asyncio import Redis

from adapters_store.valkey import store_errors
from server.finetune.leases import LEASE_SECONDS


class Figures(msgspec.Struct, frozen=True):
    queued: int
    training: int
    publishing: int
    silence_seconds: float  # of the worker that was heard of longest ago, among those that have a job


async def figures(redis: Redis) -> Figures:
    """One round trip, however many jobs there are. Raises StoreError."""
    with store_errors():
        async with redis.pipeline(transaction=True) as pipeline:
            for where in ("queued", "leases", "publishing"):
                pipeline.zcard(f"pp:jobs:{where}")
            pipeline.zrange("pp:jobs:leases", 0, 0, withscores=True)
            pipeline.time()
            queued, training, publishing, first, (seconds, microseconds) = await pipeline.execute()
    now = seconds + microseconds / 1e6
    silence = LEASE_SECONDS - (first[0][1] / 1000 - now) if first else 0.0
    return Figures(queued, training, publishing, max(0.0, silence))
