"""An attempt on a real Valkey with a stand-in for its child: whatever that does, the job is in one state."""

import asyncio
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from msgspec.structs import replace
from redis.asyncio import Redis

from server.finetune.jobs.job import Checkpoint, Job
from server.finetune.jobs.jobs import Jobs
from server.finetune.jobs.leases import MAX_ATTEMPTS
from server.finetune.worker import attempt as module
from server.finetune.worker.attempt import EXIT_SAVED, Attempt
from tests.fixtures.jobs import RECIPE, fixed, lapse, result, taken
from tests.waiting import eventually

pytestmark = pytest.mark.anyio
ID = "ftjob-1"
LONG = "time.sleep(600)"
STUBBORN = f"signal.signal(signal.SIGTERM, signal.SIG_IGN); ready(); {LONG}"
SAVES = f"signal.signal(signal.SIGTERM, lambda *_: sys.exit({EXIT_SAVED})); ready(); {LONG}"
CHILD = """
import os, pathlib, signal, sys, time
job, fence, folder = sys.argv[1], int(sys.argv[2]), pathlib.Path(sys.argv[3])
def ready():
    (folder / "draft").write_text(f"{job} {fence} {os.getpid()}")
    (folder / "draft").rename(folder / "ready")
"""


@pytest.fixture(autouse=True)
def _brisk(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HEARTBEAT_SECONDS", "POLL_SECONDS"):
        monkeypatch.setattr(module, name, 0.05)
    monkeypatch.setattr(module, "MAX_DELAY_SECONDS", 0.0)


class Trial:
    """Attempts at one job with stand-ins for its child."""

    def __init__(self, jobs: Jobs, folder: Path) -> None:
        self.jobs = jobs
        self.folder = folder
        self.stopping = False

    def attempt(self, job: Job, body: str, **options: Any) -> Attempt:
        return Attempt(
            self.jobs,
            job,
            command=[sys.executable, "-c", CHILD + body],
            environment={},
            folder=self.folder,
            stopping=lambda: self.stopping,
            **({"disk_bytes": 1 << 20} | options),
        )

    async def run(self, job: Job, body: str, **options: Any) -> None:
        async with asyncio.timeout(30):
            await self.attempt(job, body, **options).run()

    @asynccontextmanager
    async def running(self, job: Job, body: str, **options: Any) -> AsyncIterator[psutil.Process]:
        """The child, once it is ready; at the end of the block the attempt must end as well."""
        run = asyncio.create_task(self.run(job, body, **options))
        await eventually(lambda: self.ready.exists() or run.done())
        child = psutil.Process(int(self.ready.read_text().split()[2]))
        try:
            yield child
            await run
        finally:
            run.cancel()
        assert not child.is_running()

    @property
    def ready(self) -> Path:
        return self.folder / "ready"


@pytest.fixture
def trial(jobs: Jobs, tmp_path: Path) -> Trial:
    return Trial(jobs, tmp_path)


@pytest.fixture
async def job(jobs: Jobs) -> Job:
    await jobs.create(fixed())
    return await taken(jobs)


async def state(jobs: Jobs) -> tuple[str, str]:
    now = await jobs.get("t", ID)
    return now.status, now.phase


async def test_the_child_learns_its_job_and_fence(trial: Trial, job: Job) -> None:
    await trial.run(job, "ready()")
    assert trial.ready.read_text().split()[:2] == [ID, str(job.fence)]


async def test_the_lease_is_kept_while_the_child_runs(trial: Trial, job: Job, jobs: Jobs) -> None:
    async with trial.running(job, STUBBORN) as child:
        before = (await jobs.get("t", ID)).lease_until
        await asyncio.sleep(0.5)
        assert (await jobs.get("t", ID)).lease_until > before
        child.kill()


async def test_a_worker_that_was_slow_goes_on(trial: Trial, job: Job, jobs: Jobs, redis: Redis) -> None:
    """Its lease ended, and nobody has taken the job: its next beat renews it."""
    async with trial.running(job, STUBBORN) as child:
        for _ in range(MAX_ATTEMPTS + 1):
            await lapse(redis)
            await jobs.sweep()
            await asyncio.sleep(0.3)
            now = await jobs.get("t", ID)
            assert (now.status, now.phase, now.fence, now.attempts) == ("running", "training", job.fence, 1)
        assert child.is_running()
        assert await jobs.trained(ID, job.fence, result())
        child.kill()
    assert await state(jobs) == ("running", "publishing")


async def test_a_disk_that_cannot_be_read_stops_no_beat(
    trial: Trial, job: Job, jobs: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_folder: Path) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(module, "bytes_in", broken)
    async with trial.running(job, STUBBORN) as child:
        before = (await jobs.get("t", ID)).lease_until
        await asyncio.sleep(0.5)
        assert (await jobs.get("t", ID)).lease_until > before
        child.kill()


async def test_what_the_child_has_said_stands(trial: Trial, job: Job, jobs: Jobs) -> None:
    async with trial.running(job, STUBBORN) as child:
        assert await jobs.trained(ID, job.fence, result())
        child.kill()
    assert await state(jobs) == ("running", "publishing")


@pytest.mark.parametrize(
    ("body", "how"),
    [("os.kill(os.getpid(), 9)", "was ended by SIGKILL"), ("sys.exit(3)", "ended with status 3")],
)
async def test_a_child_that_dies_is_tried_again(
    body: str, how: str, trial: Trial, job: Job, jobs: Jobs
) -> None:
    await trial.run(job, body)
    assert await state(jobs) == ("queued", "queued")
    assert how in (await jobs.events(ID))[-1].message


async def test_a_child_that_always_dies_fails_the_job(trial: Trial, job: Job, jobs: Jobs) -> None:
    for number in range(MAX_ATTEMPTS):
        assert (await jobs.get("t", ID)).attempts == number + 1
        await trial.run(job, "sys.exit(1)")
        if number < MAX_ATTEMPTS - 1:
            job = await taken(jobs, worker=f"w{number}")
    assert await state(jobs) == ("failed", "done")
    error = (await jobs.get("t", ID)).error
    assert error is not None
    assert error.code == "worker_crashed"


async def test_a_new_checkpoint_begins_the_count_anew(trial: Trial, job: Job, jobs: Jobs) -> None:
    for step in range(1, MAX_ATTEMPTS + 3):
        assert await jobs.checkpoint(ID, job.fence, Checkpoint(created=1, step=step, metrics={}))
        await trial.run(job, "sys.exit(1)")
        job = await taken(jobs, worker=f"w{step}")


async def test_cancel_kills_it_whatever_it_does(trial: Trial, job: Job, jobs: Jobs) -> None:
    async with trial.running(job, STUBBORN):
        await jobs.cancel("t", ID)
    assert await state(jobs) == ("cancelled", "done")


async def test_a_job_that_is_anothers_is_let_go(trial: Trial, job: Job, jobs: Jobs, redis: Redis) -> None:
    async with trial.running(job, STUBBORN) as child:
        child.suspend()  # together with the worker, as on a machine that sleeps
        while (other := await jobs.take(ID, "other")) is None:  # until the worker's own beat is too late
            await lapse(redis)
            await jobs.sweep()
    now = await jobs.get("t", ID)
    assert (now.fence, now.phase) == (other.fence, "training")


async def test_a_pause_waits_for_the_step_that_runs(trial: Trial, job: Job, jobs: Jobs) -> None:
    """However long it takes: what has been trained since the last checkpoint is not thrown away."""
    slow = SAVES.replace("sys.exit", "(time.sleep(2), sys.exit")
    async with trial.running(job, slow.replace(f"exit({EXIT_SAVED})", f"exit({EXIT_SAVED}))")):
        await jobs.pause("t", ID)
    assert await state(jobs) == ("queued", "paused")
    assert (await jobs.get("t", ID)).attempts == 0
    await jobs.resume("t", ID)
    assert await state(jobs) == ("queued", "queued")


async def test_resumed_before_it_has_paused_it_goes_on(trial: Trial, job: Job, jobs: Jobs) -> None:
    asked = "signal.signal(signal.SIGTERM, lambda *_: (folder / 'asked').touch()); ready()"
    saves = f"while not (folder / 'save').exists(): time.sleep(0.02)\nsys.exit({EXIT_SAVED})"
    async with trial.running(job, f"{asked}\n{saves}"):
        await jobs.pause("t", ID)
        await eventually((trial.folder / "asked").exists)
        await jobs.resume("t", ID)
        (trial.folder / "save").touch()
    assert await state(jobs) == ("queued", "queued")


async def test_cancelled_while_it_pauses(trial: Trial, job: Job, jobs: Jobs) -> None:
    async with trial.running(job, STUBBORN):
        await jobs.pause("t", ID)
        await asyncio.sleep(0.2)
        await jobs.cancel("t", ID)
    assert await state(jobs) == ("cancelled", "done")


@pytest.mark.parametrize("body", [SAVES, STUBBORN])
async def test_a_worker_that_stops_gives_the_job_back(
    body: str, trial: Trial, job: Job, jobs: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SAVE_SECONDS", 0.3)
    async with trial.running(job, body):
        trial.stopping = True
    assert await state(jobs) == ("queued", "queued")
    assert (await jobs.get("t", ID)).attempts == 0


async def test_a_child_that_somebody_else_stopped_goes_on(trial: Trial, job: Job, jobs: Jobs) -> None:
    async with trial.running(job, SAVES) as child:
        child.send_signal(signal.SIGTERM)
    assert await state(jobs) == ("queued", "queued")


async def test_its_time_is_limited(
    trial: Trial, job: Job, jobs: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "OVERTIME_SECONDS", 0.0)
    await trial.run(replace(job, recipe=replace(RECIPE, max_seconds=1)), STUBBORN)
    await failed(jobs, "time_limit", "longer than its max_seconds, 1")


async def test_its_disk_is_limited(trial: Trial, job: Job, jobs: Jobs) -> None:
    writes = "(folder / 'x').mkdir(); (folder / 'x' / 'y').write_bytes(bytes(5000))"
    await trial.run(job, f"{writes}; {LONG}", disk_bytes=4999)
    await failed(jobs, "disk_limit", "more than 4999 bytes")


async def failed(jobs: Jobs, code: str, said: str) -> None:
    now = await jobs.get("t", ID)
    assert now.error is not None
    assert (now.status, now.error.code) == ("failed", code)
    assert said in now.error.message


async def test_nothing_is_left_when_the_worker_is_interrupted(trial: Trial, job: Job) -> None:
    run = asyncio.create_task(trial.run(job, STUBBORN))
    await eventually(trial.ready.exists)
    child = psutil.Process(int(trial.ready.read_text().split()[2]))
    run.cancel()
    await asyncio.wait([run])
    assert not child.is_running()


async def test_a_kill_for_want_of_memory_is_said(
    trial: Trial, job: Job, jobs: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    kills = iter([3, 4])
    monkeypatch.setattr(module, "oom_kills", lambda: next(kills))
    await trial.run(job, "os.kill(os.getpid(), 9)")
    assert "more memory than there is" in (await jobs.events(ID))[-1].message
    assert await state(jobs) == ("queued", "queued")
