"""A job's life: every way through its states, and that stale workers change nothing."""

import asyncio
import contextlib
import random
from collections.abc import Awaitable, Callable

import pytest
from redis.asyncio import Redis

from server.errors import Conflict, InvalidField, NotFound, QuotaExceeded, StoreError
from server.finetune.jobs import jobs as module
from server.finetune.jobs import leases
from server.finetune.jobs.job import Checkpoint, JobError, Progress, new_event
from server.finetune.jobs.jobs import IdempotencyKey, Jobs
from server.finetune.jobs.keys import WORKER_QUEUE
from server.finetune.jobs.queue import WorkerQueue
from server.finetune.jobs.transitions_lua import MAX_EVENTS
from tests.fixtures.jobs import fixed, lapse, result, taken

pytestmark = pytest.mark.anyio
ID = "ftjob-1"


async def messages(jobs: Jobs, id_: str = ID) -> list[str]:
    return [event.message for event in await jobs.events(id_, limit=100)]


async def test_from_creation_to_success(jobs: Jobs, queue: WorkerQueue, redis: Redis) -> None:
    job = await jobs.create(fixed(metadata={"a": "ü"}, validation_file="file-2"))
    assert (job.status, job.phase, job.fence, job.metadata) == ("queued", "queued", 1, {"a": "ü"})
    assert job.recipe == fixed().recipe
    assert await queue.waiting() == {ID}
    job = await taken(jobs)
    assert (job.status, job.phase, job.fence, job.attempts) == ("running", "training", 2, 1)
    assert job.started is not None
    assert (
        await jobs.heartbeat(ID, 2, Progress(step=3, total_steps=9, trained_tokens=50, estimated_finish=7))
        == "go"
    )
    job = await jobs.get("t", ID)
    assert (job.step, job.total_steps, job.trained_tokens, job.estimated_finish) == (3, 9, 50, 7)
    assert await jobs.add_event(ID, 2, new_event("info", "Step 3", "metrics", {"step": 3}))
    assert await jobs.trained(ID, 2, result(evaluation={"loss": 1.5}, better=True))
    assert await jobs.to_publish() == [ID]
    assert (await jobs.get("t", ID)).status == "running"
    assert await jobs.commit_to_version(ID, 0, 4) == 4
    assert await jobs.succeed(ID, 4, "mine@4", ["file-9"])
    job = await jobs.get("t", ID)
    assert (job.status, job.phase, job.version) == ("succeeded", "done", 4)
    assert (job.fine_tuned_model, job.result_files) == ("mine@4", ["file-9"])
    assert (job.trained_tokens, job.evaluation, job.estimated_finish) == (100, {"loss": 1.5}, None)
    assert job.finished is not None
    assert await jobs.to_publish() == []
    assert await jobs.unfinished("t") == []
    assert await redis.zrange("pp:doomed", 0, -1) == [f"tenants/t/jobs/{ID}/".encode()]
    events = await jobs.events(ID, limit=100)
    assert [event.sequence for event in events] == list(range(1, len(events) + 1))
    assert events[2].data == {"step": 3}


async def test_others_jobs_and_unknown_ones_are_one_answer(jobs: Jobs) -> None:
    await jobs.create(fixed(tenant="owner"))
    for call in (jobs.get, jobs.cancel, jobs.pause, jobs.resume):
        answers = set()
        for tenant, id_ in [("other", ID), ("owner", "ftjob-2"), ("other", "ftjob-2")]:
            with pytest.raises(NotFound) as caught:
                await call(tenant, id_)
            answers.add((caught.value.code, caught.value.message.replace(id_, "")))
        assert len(answers) == 1
    with pytest.raises(NotFound):
        await jobs.page("other", after=ID)
    assert await jobs.page("other") == []
    assert (await jobs.get("owner", ID)).phase == "queued"


async def test_lists_are_newest_first_and_page(jobs: Jobs) -> None:
    for number in range(3):
        await jobs.create(fixed(f"ftjob-{number}", created=1000.5 + number / 4))
    first = await jobs.page("t", limit=2)
    rest = await jobs.page("t", after=first[-1].id, limit=2)
    assert [job.id for job in first + rest] == ["ftjob-2", "ftjob-1", "ftjob-0"]


async def test_the_cap_counts_jobs_that_are_not_done(jobs: Jobs) -> None:
    for number in range(3):
        await jobs.create(fixed(f"ftjob-{number}"))
    with pytest.raises(QuotaExceeded, match="3 unfinished"):
        await jobs.create(fixed("ftjob-3"))
    with pytest.raises(NotFound):
        await jobs.get("t", "ftjob-3")
    await jobs.create(fixed("ftjob-4", tenant="u"))
    await jobs.pause("t", "ftjob-0")
    with pytest.raises(QuotaExceeded):
        await jobs.create(fixed("ftjob-3"))
    await jobs.cancel("t", "ftjob-0")
    await jobs.create(fixed("ftjob-3"))


async def test_old_jobs_that_are_done_are_forgotten(
    jobs: Jobs, redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_JOBS_KEPT", 2)
    for number in range(5):
        await jobs.create(fixed(f"ftjob-{number}", created=number))
        if number != 1:
            await jobs.cancel("t", f"ftjob-{number}")
    assert [job.id for job in await jobs.page("t")] == ["ftjob-4", "ftjob-3", "ftjob-1"], "1 is not done"
    left = [key async for key in redis.scan_iter("pp:job:ftjob-0*")]
    assert left == []


async def test_fifty_times_the_same_request_make_one_job(jobs: Jobs, queue: WorkerQueue) -> None:
    same = IdempotencyKey("key", "fingerprint")
    made = await asyncio.gather(*(jobs.create(fixed(f"ftjob-{number}"), same) for number in range(50)))
    assert len({job.id for job in made}) == 1
    assert len(await jobs.page("t")) == 1
    assert await jobs.find_same("t", same) == await jobs.get("t", made[0].id)
    assert await jobs.find_same("t", IdempotencyKey("other", "fingerprint")) is None
    assert await jobs.find_same("u", same) is None
    for call in (
        jobs.find_same("t", IdempotencyKey("key", "changed")),
        jobs.create(fixed("ftjob-99"), IdempotencyKey("key", "changed")),
    ):
        with pytest.raises(InvalidField, match="Idempotency-Key"):
            await call


async def test_one_worker_of_many_gets_the_job(jobs: Jobs) -> None:
    await jobs.create(fixed())
    got = await asyncio.gather(*(jobs.take(ID, f"w{number}") for number in range(20)))
    (winner,) = [job for job in got if job]
    again = await jobs.take(ID, f"w{got.index(winner)}")
    assert again == winner, "a lost answer is asked for again"
    assert await jobs.take("ftjob-unknown", "w") is None


async def test_a_stale_fence_changes_nothing(jobs: Jobs, redis: Redis) -> None:
    await jobs.create(fixed())
    old = (await taken(jobs)).fence
    await lapse(redis)
    await jobs.sweep()
    new = (await taken(jobs, worker="w2")).fence
    before = await jobs.get("t", ID)
    said = await messages(jobs)
    assert await jobs.heartbeat(ID, old, Progress(step=9, total_steps=9, trained_tokens=9)) == "lost"
    assert not await jobs.add_event(ID, old, new_event("info", "late"))
    assert not await jobs.checkpoint(ID, old, Checkpoint(created=1, step=9, metrics={}))
    assert await jobs.release(ID, old) == "lost"
    assert not await jobs.trained(ID, old, result())
    assert await jobs.fail(ID, old, JobError("x", "y"), retry=False) == "lost"
    assert await jobs.get("t", ID) == before
    assert await messages(jobs) == said
    assert await jobs.checkpoints(ID) == []
    assert await jobs.trained(ID, new, result(steps=7))
    assert not await jobs.trained(ID, old, result())
    assert await jobs.trained(ID, new, result(steps=8)), "an answer that was lost is asked for again"
    assert (await jobs.get("t", ID)).step == 7


async def test_a_lapsed_lease_goes_back_to_the_queue_and_a_live_one_stays(
    jobs: Jobs, redis: Redis, queue: WorkerQueue
) -> None:
    await jobs.create(fixed())
    await taken(jobs)
    await redis.delete(WORKER_QUEUE)
    await jobs.sweep()
    assert (await jobs.get("t", ID)).phase == "training"
    await lapse(redis)
    await jobs.sweep()
    job = await jobs.get("t", ID)
    assert (job.phase, job.status, job.attempts) == ("queued", "queued", 1)
    assert await queue.waiting() == {ID}
    assert "lost" in (await messages(jobs))[-1]


@pytest.mark.parametrize("word", ["heartbeat", "event", "checkpoint", "trained", "fail", "release"])
async def test_a_lapsed_lease_is_renewed_by_any_word_while_nobody_has_the_job(
    jobs: Jobs, redis: Redis, word: str
) -> None:
    await jobs.create(fixed())
    job = await taken(jobs)
    await lapse(redis)
    await jobs.sweep()
    assert (await jobs.get("t", ID)).phase == "queued"
    words: dict[str, Callable[[], Awaitable[object]]] = {
        "heartbeat": lambda: jobs.heartbeat(ID, job.fence),
        "event": lambda: jobs.add_event(ID, job.fence, new_event("info", "I am here.")),
        "checkpoint": lambda: jobs.checkpoint(ID, job.fence, Checkpoint(created=1, step=5, metrics={})),
        "trained": lambda: jobs.trained(ID, job.fence, result()),
        "fail": lambda: jobs.fail(ID, job.fence, JobError("x", "y"), retry=False),
        "release": lambda: jobs.release(ID, job.fence),
    }
    assert await words[word]() not in ("lost", False)
    now = await jobs.get("t", ID)
    phases = {"trained": "publishing", "fail": "done", "release": "queued"}
    assert now.phase == phases.get(word, "training")
    if now.phase == "training":
        assert now.fence == job.fence
        await jobs.sweep()
        assert (await jobs.get("t", ID)).phase == "training", "its lease is as long as any"
        assert await jobs.take(ID, "w2") is None


async def test_a_lapsed_lease_is_not_renewed_once_the_tenant_has_changed_the_job(
    jobs: Jobs, redis: Redis
) -> None:
    await jobs.create(fixed())
    job = await taken(jobs)
    await lapse(redis)
    await jobs.sweep()
    await jobs.pause("t", ID)
    assert await jobs.heartbeat(ID, job.fence) == "lost"
    await jobs.resume("t", ID)
    assert await jobs.heartbeat(ID, job.fence) == "lost"
    await jobs.cancel("t", ID)
    assert await jobs.heartbeat(ID, job.fence) == "cancel"


async def test_attempts_without_progress_are_bounded(jobs: Jobs, redis: Redis) -> None:
    await jobs.create(fixed())
    for attempt in range(2 * leases.MAX_ATTEMPTS - 1):
        job = await taken(jobs, worker=f"w{attempt}")
        if attempt == leases.MAX_ATTEMPTS - 1:
            assert await jobs.checkpoint(ID, job.fence, Checkpoint(created=1, step=5, metrics={}))
        await lapse(redis)
        await jobs.sweep()
        assert (await jobs.get("t", ID)).phase == "queued"
    job = await taken(jobs, worker="last")
    assert await jobs.checkpoint(ID, job.fence, Checkpoint(created=1, step=5, metrics={})), "no new step"
    await lapse(redis)
    await jobs.sweep()
    job = await jobs.get("t", ID)
    assert (job.status, job.error and job.error.code) == ("failed", "worker_lost")


async def test_failing_with_and_without_another_attempt(jobs: Jobs, queue: WorkerQueue) -> None:
    error = JobError("out_of_memory", "Too large.", "training_file")
    await jobs.create(fixed())
    for attempt in range(leases.MAX_ATTEMPTS - 1):
        job = await taken(jobs, worker=f"w{attempt}")
        assert await jobs.fail(ID, job.fence, error, retry=True) == "queued"
    job = await taken(jobs, worker="last")
    assert await jobs.fail(ID, job.fence, error, retry=True) == "failed"
    job = await jobs.get("t", ID)
    assert (job.status, job.error) == ("failed", error)
    await jobs.create(fixed("ftjob-2"))
    job = await taken(jobs, "ftjob-2")
    assert await jobs.fail("ftjob-2", job.fence, error, retry=False) == "failed"


async def test_a_running_job_is_cancelled_at_once(jobs: Jobs) -> None:
    await jobs.create(fixed())
    fence = (await taken(jobs)).fence
    assert (await jobs.cancel("t", ID)).status == "cancelled"
    assert (await jobs.cancel("t", ID)).status == "cancelled"
    assert await jobs.heartbeat(ID, fence) == "cancel"
    assert not await jobs.trained(ID, fence, result())
    assert await jobs.to_publish() == []
    assert await jobs.take(ID, "w2") is None
    for call in (jobs.pause, jobs.resume):
        with pytest.raises(Conflict, match="cancelled already"):
            await call("t", ID)


async def test_a_trained_job_can_be_cancelled_until_its_version_is_certain(jobs: Jobs) -> None:
    for id_ in (ID, "ftjob-2"):
        await jobs.create(fixed(id_))
        job = await taken(jobs, id_)
        await jobs.trained(id_, job.fence, result())
        with pytest.raises(Conflict, match="being published"):
            await jobs.pause("t", id_)
    assert (await jobs.cancel("t", ID)).status == "cancelled"
    assert await jobs.commit_to_version(ID, 0, 1) is None
    assert not await jobs.succeed(ID, 1, "mine@1", [])
    assert not await jobs.reject(ID, JobError("x", "y"))
    assert await jobs.commit_to_version("ftjob-2", 0, 1) == 1
    with pytest.raises(Conflict, match="being published"):
        await jobs.cancel("t", "ftjob-2")
    assert await jobs.succeed("ftjob-2", 1, "mine@1", [])


async def test_intentions_change_only_from_what_was_seen(jobs: Jobs) -> None:
    await jobs.create(fixed())
    await jobs.trained(ID, (await taken(jobs)).fence, result())
    assert await jobs.commit_to_version(ID, 0, 3) == 3
    assert await jobs.commit_to_version(ID, 0, 5) == 3
    assert await jobs.commit_to_version(ID, 3, 5) == 5
    assert not await jobs.succeed(ID, 3, "mine@3", [])
    assert await jobs.succeed(ID, 5, "mine@5", [])
    assert await jobs.succeed(ID, 5, "mine@5", [])
    assert not await jobs.reject(ID, JobError("x", "y"))
    with pytest.raises(Conflict, match="succeeded already"):
        await jobs.cancel("t", ID)


async def test_a_waiting_job_is_paused_at_once_and_resumed(jobs: Jobs, queue: WorkerQueue) -> None:
    await jobs.create(fixed())
    job = await jobs.pause("t", ID)
    assert (job.phase, job.status) == ("paused", "queued")
    assert await jobs.take(ID, "w1") is None
    assert (await jobs.pause("t", ID)).phase == "paused"
    assert (await jobs.resume("t", ID)).phase == "queued"
    assert (await taken(jobs)).phase == "training"


async def test_a_running_job_is_paused_by_its_worker(jobs: Jobs) -> None:
    await jobs.create(fixed())
    fence = (await taken(jobs)).fence
    assert (await jobs.pause("t", ID)).phase == "training"
    assert await jobs.heartbeat(ID, fence) == "pause"
    assert await jobs.release(ID, fence) == "paused"
    assert (await jobs.get("t", ID)).phase == "paused"
    assert await jobs.heartbeat(ID, fence) == "lost"
    assert (await jobs.resume("t", ID)).attempts == 0
    fence = (await taken(jobs, worker="w2")).fence
    await jobs.pause("t", ID)
    await jobs.resume("t", ID)
    assert await jobs.heartbeat(ID, fence) == "go", "thought better of it in time"


async def test_a_worker_lost_while_pausing_leaves_a_paused_job(jobs: Jobs, redis: Redis) -> None:
    await jobs.create(fixed())
    await taken(jobs)
    await jobs.pause("t", ID)
    await lapse(redis)
    await jobs.sweep()
    assert (await jobs.get("t", ID)).phase == "paused"


async def test_an_entry_that_got_lost_is_pushed_again(
    jobs: Jobs, redis: Redis, queue: WorkerQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    await jobs.create(fixed())
    await jobs.sweep()
    assert await redis.llen(WORKER_QUEUE) == 1, "the entry still waits"
    await redis.delete(WORKER_QUEUE)
    await jobs.sweep()
    assert await queue.waiting() == set(), "the worker that took it may be on its way"
    await redis.zadd("pp:jobs:queued", {ID: 1})
    await asyncio.gather(*(jobs.sweep() for _ in range(5)))
    assert await redis.llen(WORKER_QUEUE) == 1


async def test_a_job_that_rq_was_to_bring_is_queued_again(
    jobs: Jobs, redis: Redis, queue: WorkerQueue
) -> None:
    """A Valkey that an older version used: what rq has left there is not read."""
    await jobs.create(fixed())
    await redis.delete(WORKER_QUEUE)
    await redis.zadd("pp:jobs:queued", {ID: 1})
    await redis.rpush("rq:queue:finetune", f"{ID}_0")
    await redis.hset(f"rq:job:{ID}_0", mapping={"status": "queued", "timeout": -1})
    await jobs.sweep()
    assert await queue.take(0.1) == ID
    assert await queue.take(0.1) is None


async def test_a_job_whose_wake_up_failed_is_there_and_pushed_later(
    jobs: Jobs, queue: WorkerQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(queue: WorkerQueue, job: str) -> None:
        raise StoreError("down")

    with monkeypatch.context() as patch:
        patch.setattr(WorkerQueue, "push", broken)
        await jobs.create(fixed())
    assert (await jobs.get("t", ID)).phase == "queued"
    monkeypatch.setattr(leases, "WAKE_AGAIN_SECONDS", 0)
    await jobs.sweep()
    assert await queue.waiting() == {ID}


async def test_events_page_both_ways_and_are_bounded(jobs: Jobs, redis: Redis) -> None:
    await jobs.create(fixed())
    fence = (await taken(jobs)).fence
    for number in range(5):
        await jobs.add_event(ID, fence, new_event("info", f"e{number}"))
    newest = await jobs.events(ID, limit=2, newest=True)
    assert [event.message for event in newest] == ["e4", "e3"]
    older = await jobs.events(ID, before=newest[-1].sequence, limit=2, newest=True)
    assert [event.message for event in older] == ["e2", "e1"]
    assert [event.message for event in await jobs.events(ID, after=5)] == ["e3", "e4"]
    members = {f"x{number}": 100 + number for number in range(MAX_EVENTS + 10)}
    await redis.zadd(f"pp:job:{ID}:events", members)
    await jobs.add_event(ID, fence, new_event("info", "last"))
    assert await redis.zcard(f"pp:job:{ID}:events") == MAX_EVENTS


async def test_checkpoints_are_by_step_and_the_newer_wins(jobs: Jobs) -> None:
    await jobs.create(fixed())
    fence = (await taken(jobs)).fence
    for created, step in [(1, 5), (2, 10), (3, 5)]:
        metrics = {"train_loss": float(created)}
        assert await jobs.checkpoint(ID, fence, Checkpoint(created=created, step=step, metrics=metrics))
    found = await jobs.checkpoints(ID)
    assert [(checkpoint.step, checkpoint.created) for checkpoint in found] == [(10, 2), (5, 3)]


async def test_claims_exclude_for_a_while(jobs: Jobs, redis: Redis) -> None:
    await jobs.create(fixed())
    assert await jobs.claim(ID, "a")
    assert await jobs.claim(ID, "a")
    assert not await jobs.claim(ID, "b")
    await redis.pexpire(f"pp:job:{ID}:claim", 0)
    assert await jobs.claim(ID, "b")


class Crowd:
    """Workers and a tenant who act at random, on what they knew when they last looked."""

    def __init__(self, jobs: Jobs, redis: Redis, draw: random.Random) -> None:
        self.jobs, self.redis, self.draw = jobs, redis, draw
        self.fences: list[int] = [0]
        self.wins: set[int] = set()

    async def act(self, turn: int) -> None:
        acts = [self.take, self.heartbeat, self.save, self.train, self.fail, self.lapse, self.ask]
        await self.draw.choice(acts)(turn, self.draw.choice(self.fences[-3:]))

    async def take(self, turn: int, fence: int) -> None:
        if job := await self.jobs.take(ID, f"w{turn}"):
            self.fences.append(job.fence)

    async def heartbeat(self, turn: int, fence: int) -> None:
        await self.jobs.heartbeat(ID, fence)

    async def save(self, turn: int, fence: int) -> None:
        await self.jobs.checkpoint(ID, fence, Checkpoint(created=1, step=turn, metrics={}))

    async def train(self, turn: int, fence: int) -> None:
        if self.draw.random() < 0.1 and await self.jobs.trained(ID, fence, result()):
            self.wins.add(fence)

    async def fail(self, turn: int, fence: int) -> None:
        if self.draw.random() < 0.1:
            await self.jobs.fail(ID, fence, JobError("x", "y"), retry=self.draw.random() < 0.9)

    async def lapse(self, turn: int, fence: int) -> None:
        if (await self.jobs.get("t", ID)).phase == "training":
            await lapse(self.redis)
            await self.jobs.sweep()

    async def ask(self, turn: int, fence: int) -> None:
        asked = self.draw.choice([self.jobs.pause, self.jobs.resume] * 10 + [self.jobs.cancel])
        with contextlib.suppress(Conflict):
            await asked("t", ID)


@pytest.mark.parametrize("seed", range(8))
async def test_any_order_of_events_ends_with_at_most_one_version(jobs: Jobs, redis: Redis, seed: int) -> None:
    draw = random.Random(seed)
    await jobs.create(fixed())
    crowd = Crowd(jobs, redis, draw)
    published: set[int] = set()
    over = None
    for turn in range(300):
        await crowd.act(turn)
        if await jobs.to_publish():
            intended = await jobs.commit_to_version(ID, draw.choice([0, 7]), draw.choice([7, 8]))
            if intended and await jobs.succeed(ID, intended, f"mine@{intended}", []):
                published.add(intended)
        now = await jobs.get("t", ID)
        assert over is None or now == over, "what is over stays as it is"
        if now.phase == "done":
            over = now
    assert len(crowd.wins) <= 1
    assert len(published) <= 1
    assert (over is not None and over.status == "succeeded") == bool(published)
    assert now.fence >= max(crowd.fences)
