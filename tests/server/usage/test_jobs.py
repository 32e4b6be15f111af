"""A fine-tuning job is in the sums when it has ended, once, however its calls are repeated."""

import time

import pytest
from redis.asyncio import Redis

from server.finetune.jobs.job import JobError, Progress
from server.finetune.jobs.jobs import Jobs
from server.usage.record import SECONDS_A_DAY, Amounts, Group
from tests.fixtures.jobs import fixed, result, taken
from tests.server.usage.records import sums_of

pytestmark = pytest.mark.anyio


async def sums(redis: Redis) -> dict[Group, Amounts]:
    return await sums_of(redis, day=int(time.time() // SECONDS_A_DAY))


async def test_a_job_that_succeeds_counts_for_its_version_and_key(jobs: Jobs, redis: Redis) -> None:
    await jobs.create(fixed(key="key_9"))
    job = await taken(jobs)
    await jobs.trained(job.id, job.fence, made := result())
    assert await sums(redis) == {}
    await jobs.commit_to_version(job.id, 0, 3)
    for _ in range(3):
        assert await jobs.succeed(job.id, 3, "ft:x", [])
    [(group, amounts)] = (await sums(redis)).items()
    assert group == Group(f"{job.name}@3", "key_9")
    assert amounts._replace(training_ms=0) == Amounts(jobs=1, training_tokens=made.trained_tokens)


async def test_a_job_that_is_cancelled_counts_what_was_reported(jobs: Jobs, redis: Redis) -> None:
    await jobs.create(fixed())
    job = await taken(jobs)
    await jobs.heartbeat(job.id, job.fence, Progress(step=1, total_steps=9, trained_tokens=70))
    for _ in range(2):
        await jobs.cancel("t", job.id)
    [(group, amounts)] = (await sums(redis)).items()
    assert group == Group(job.name, "")
    assert amounts._replace(training_ms=0) == Amounts(jobs=1, cancelled_jobs=1, training_tokens=70)


async def test_a_job_that_never_ran_or_failed_counts_as_such(jobs: Jobs, redis: Redis) -> None:
    await jobs.create(fixed("ftjob-1"))
    await jobs.cancel("t", "ftjob-1")
    await jobs.create(fixed("ftjob-2"))
    job = await taken(jobs, "ftjob-2")
    await jobs.fail(job.id, job.fence, JobError("x", "It failed."), retry=False)
    total = Amounts()
    for amounts in (await sums(redis)).values():
        total = total.plus(amounts)
    assert total._replace(training_ms=0) == Amounts(jobs=2, failed_jobs=1, cancelled_jobs=1)
