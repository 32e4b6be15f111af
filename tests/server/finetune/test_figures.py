"""The figures of jobs on a real Valkey."""

import pytest
from redis.asyncio import Redis

from server.finetune.figures import Figures, figures
from server.finetune.jobs import Jobs
from server.finetune.leases import LEASE_SECONDS
from tests.fixtures.jobs import fixed, lapse, result, taken

pytestmark = pytest.mark.anyio


async def test_each_job_counts_where_it_stands(jobs: Jobs, redis: Redis) -> None:
    assert await figures(redis) == Figures(0, 0, 0, 0.0)
    for number in range(3):
        await jobs.create(fixed(f"ftjob-{number}"))
    await taken(jobs, "ftjob-0")
    job = await taken(jobs, "ftjob-1")
    assert await jobs.trained("ftjob-1", job.fence, result())
    found = await figures(redis)
    assert (found.queued, found.training, found.publishing) == (1, 1, 1)
    assert found.silence_seconds < LEASE_SECONDS
    await lapse(redis, "ftjob-0")
    assert (await figures(redis)).silence_seconds > LEASE_SECONDS
