"""The figures of jobs on a real Valkey."""

import time

import msgspec
import pytest
from redis.asyncio import Redis

from server.finetune.jobs.jobs import Jobs
from server.finetune.jobs.keys import WORKERS
from server.finetune.jobs.leases import LEASE_SECONDS
from server.finetune.jobs.stats import (
    MAX_WORKERS,
    WORKER_TIMEOUT_SECONDS,
    JobStats,
    WorkerState,
    job_stats,
    report,
)
from tests.fixtures.jobs import fixed, lapse, result, taken

pytestmark = pytest.mark.anyio


async def test_each_job_counts_where_it_stands(jobs: Jobs, redis: Redis) -> None:
    assert await job_stats(redis) == JobStats(0, 0, 0, 0.0)
    for number in range(3):
        await jobs.create(fixed(f"ftjob-{number}"))
    await taken(jobs, "ftjob-0")
    job = await taken(jobs, "ftjob-1")
    assert await jobs.trained("ftjob-1", job.fence, result())
    found = await job_stats(redis)
    assert (found.queued, found.training, found.publishing) == (1, 1, 1)
    assert found.silence_seconds < LEASE_SECONDS
    await lapse(redis, "ftjob-0")
    assert (await job_stats(redis)).silence_seconds > LEASE_SECONDS


async def test_jobs_that_ended_count_by_how(jobs: Jobs, redis: Redis) -> None:
    for number in range(3):
        await jobs.create(fixed(f"ftjob-{number}"))
        await jobs.cancel("t", f"ftjob-{number}")
        await jobs.cancel("t", f"ftjob-{number}")
    assert (await job_stats(redis)).counters == {"finished:cancelled": 3}


async def test_workers_add_up_and_those_long_silent_are_gone(redis: Redis) -> None:
    await redis.flushall()
    for worker in ("w1", "w2"):
        for loss in (2.0, 1.5):
            await report(redis, worker, True, loss, {"training_tokens": 10, "checkpoints": 1})
    await report(redis, "w2", False, None, {})
    found = await job_stats(redis)
    assert found.counters == {"training_tokens": 40, "checkpoints": 4}
    assert {name: (state.busy, state.loss) for name, state in found.workers.items()} == {
        "w1": (True, 1.5),
        "w2": (False, None),
    }
    long_ago = WorkerState(time.time() - WORKER_TIMEOUT_SECONDS - 1, True, 9.0)
    await redis.hset(WORKERS, "w1", msgspec.json.encode(long_ago).decode())
    assert set((await job_stats(redis)).workers) == {"w2"}
    await report(redis, "w3", False, None, {})
    assert set(await redis.hkeys(WORKERS)) == {b"w2", b"w3"}
    for number in range(MAX_WORKERS + 5):
        await report(redis, f"x{number}", False, None, {})
    assert len((await job_stats(redis)).workers) == MAX_WORKERS
