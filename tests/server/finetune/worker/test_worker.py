"""The worker process: real, on a real Valkey, its children stand-ins."""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import psutil
import pytest

from adapters_store import valkey
from adapters_store.object_store.store import Objects
from adapters_store.registry.identity import prove_identity
from adapters_store.valkey import connect
from server.child_process import REFUSED
from server.finetune.jobs.jobs import Jobs
from server.finetune.jobs.queue import WorkerQueue
from server.finetune.worker import worker as worker_module
from server.finetune.worker.attempt import EXIT_SAVED
from server.finetune.worker.worker import Worker
from tests.fixtures.jobs import fixed, result
from tests.fixtures.workers import Plant, plant, stop
from tests.waiting import until

pytestmark = pytest.mark.anyio
ID = "ftjob-1"
CHILD = """
import os, pathlib, signal, sys, time
from server.child_process import end_with_parent
end_with_parent(int(os.environ["POLYPEFT_SUPERVISOR_PID"]))
job, fence, folder = sys.argv[1], int(sys.argv[2]), pathlib.Path(sys.argv[3])
signal.signal(signal.SIGTERM, lambda *_: sys.exit({saved}))
with pathlib.Path({said!r}).open("a") as file:
    file.write(f"{{job}} {{fence}} {{os.getpid()}} {{os.getppid()}}\\n")
time.sleep(600)
"""


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Plant]:
    with plant(tmp_path) as it:
        (tmp_path / "child.py").write_text(CHILD.format(saved=EXIT_SAVED, said=str(tmp_path / "said")))
        yield it


@pytest.fixture
async def jobs(site: Plant) -> AsyncIterator[Jobs]:
    async with connect(site.url) as redis:
        yield Jobs(redis)


class Children:
    """What stand-ins have said of themselves: job, fence, own process, the worker's."""

    def __init__(self, site: Plant) -> None:
        self._path = site.folder / "said"
        self._site = site

    def __call__(self) -> list[list[str]]:
        return [line.split() for line in self._path.read_text().splitlines()] if self._path.exists() else []

    async def wait(self, count: int) -> list[str]:
        await asyncio.to_thread(until, lambda: len(self()) >= count, self._site.log)
        return self()[-1]


@pytest.fixture
def children(site: Plant) -> Children:
    return Children(site)


async def test_a_call_brings_a_child_and_the_next_job_waits(
    site: Plant, jobs: Jobs, children: Children
) -> None:
    worker = site.start_worker(site.folder / "child.py")
    await jobs.create(fixed())
    await jobs.create(fixed("ftjob-2"))
    job, fence, pid, parent = await children.wait(1)
    assert (job, int(fence), int(parent)) == (ID, 2, worker.pid)
    for process in (psutil.Process(int(pid)), psutil.Process(worker.pid)):
        assert not any("sock" in word or "redis" in word for word in process.cmdline()[3:])
    environment = psutil.Process(int(pid)).environ()
    assert environment["HF_HUB_OFFLINE"] == "1"
    assert os.getpgid(int(pid)) == int(pid) != os.getpgid(worker.pid)
    assert await jobs.trained(ID, 2, result())
    os.kill(int(pid), signal.SIGKILL)
    assert (await children.wait(2))[0] == "ftjob-2"
    assert (await jobs.get("t", ID)).phase == "publishing"
    assert len(list((site.settings.data_dir / "finetune").iterdir())) == 1


async def test_sigterm_saves_and_gives_the_job_back(site: Plant, jobs: Jobs, children: Children) -> None:
    worker = site.start_worker(site.folder / "child.py")
    await jobs.create(fixed())
    pid = int((await children.wait(1))[2])
    assert await asyncio.to_thread(stop, worker) == 0, site.log()
    assert not psutil.pid_exists(pid)
    job = await jobs.get("t", ID)
    assert (job.phase, job.attempts) == ("queued", 0)
    assert list((site.settings.data_dir / "finetune").iterdir()) == []
    site.start_worker(site.folder / "child.py")
    assert (await children.wait(2))[0] == ID


def test_a_worker_loads_no_model_library() -> None:
    """It only waits and starts children; the child that trains loads them."""
    program = "import sys, server.finetune.worker.worker; print(*sys.modules)"
    modules = subprocess.check_output([sys.executable, "-c", program], text=True).split()
    assert not {"torch", "transformers", "numba"} & set(modules)


async def test_an_idle_worker_stops_at_once(site: Plant) -> None:
    worker = site.start_worker(site.folder / "child.py")
    await asyncio.to_thread(until, lambda: (site.settings.data_dir / "finetune").exists(), site.log)
    await asyncio.sleep(1.0)
    assert await asyncio.to_thread(stop, worker) == 0


async def test_a_killed_workers_child_ends_and_its_job_goes_on(
    site: Plant, jobs: Jobs, children: Children
) -> None:
    worker = site.start_worker(site.folder / "child.py")
    await jobs.create(fixed())
    pid = int((await children.wait(1))[2])
    worker.kill()
    await asyncio.to_thread(until, lambda: not psutil.pid_exists(pid), site.log)
    site.start_worker(site.folder / "child.py")
    job, fence, *_ = await children.wait(2)
    assert (job, int(fence)) == (ID, 4)
    assert (await jobs.get("t", ID)).attempts == 2
    assert len(list((site.settings.data_dir / "finetune").iterdir())) == 1  # the dead one's is gone


async def test_cancel_ends_the_child(site: Plant, jobs: Jobs, children: Children) -> None:
    site.start_worker(site.folder / "child.py")
    await jobs.create(fixed())
    pid = int((await children.wait(1))[2])
    await jobs.cancel("t", ID)
    await asyncio.to_thread(until, lambda: not psutil.pid_exists(pid), site.log, 10)
    await jobs.create(fixed("ftjob-2"))
    assert (await children.wait(2))[0] == "ftjob-2"


async def test_an_outage_of_valkey_ends_nothing(site: Plant, jobs: Jobs, children: Children) -> None:
    """Neither a child that trains nor a worker that waits; and what the child did meanwhile is told."""
    site.start_worker(site.folder / "child.py")
    await jobs.create(fixed())
    pid = int((await children.wait(1))[2])
    site.kill_valkey()
    await asyncio.sleep(1.5)
    assert psutil.pid_exists(pid)
    os.kill(pid, signal.SIGKILL)
    await asyncio.sleep(0.5)
    site.start_valkey()
    assert int((await children.wait(2))[1]) > 2  # the crash was told, and the job taken again
    await jobs.cancel("t", ID)
    site.kill_valkey()
    site.start_valkey()
    await jobs.create(fixed("ftjob-2"))
    assert (await children.wait(3))[0] == "ftjob-2"


async def test_a_worker_that_was_stopped_for_longer_than_its_lease_goes_on(site: Plant, jobs: Jobs) -> None:
    """Nobody else took its job: what its child has trained counts."""
    worker = site.start_worker(site.folder / "child.py")
    children = Children(site)
    await jobs.create(fixed())
    _, fence, child, _ = await children.wait(1)
    os.kill(worker.pid, signal.SIGSTOP)
    try:
        await asyncio.sleep(3.5)
        await jobs.sweep()
        assert (await jobs.get("t", ID)).phase == "queued"
    finally:
        os.kill(worker.pid, signal.SIGCONT)
    async with asyncio.timeout(30):
        while (await jobs.get("t", ID)).phase != "training":  # noqa: ASYNC110 - another process's doing
            await asyncio.sleep(0.05)
    assert (await jobs.get("t", ID)).fence == int(fence)
    await asyncio.sleep(1.0)
    assert psutil.Process(int(child)).is_running()
    assert len(children()) == 1


async def test_a_job_that_is_queued_twice_is_trained_once(
    site: Plant, jobs: Jobs, children: Children
) -> None:
    for _ in range(2):
        site.start_worker(site.folder / "child.py")
    await jobs.create(fixed())
    async with connect(site.url) as redis:
        await WorkerQueue(redis).push(ID)
    _, _, _, first = await children.wait(1)
    await asyncio.to_thread(until, lambda: "not waiting for a worker" in site.log(), site.log)
    await jobs.create(fixed("ftjob-2"))
    job, _, _, second = await children.wait(2)
    assert job == "ftjob-2"
    assert first != second, "the idle worker is the one to wake"
    assert len(children()) == 2


async def test_a_valkey_that_is_slow_to_answer_is_asked_again(
    site: Plant, jobs: Jobs, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(valkey, "ANSWER_SECONDS", 0.2)
    monkeypatch.setattr(worker_module, "WAIT_SECONDS", 0.05)
    monkeypatch.setattr(worker_module, "RETRY_SECONDS", 0.0)
    worker = Worker(site.settings.model_copy(update={"redis_url": site.url}))

    async def next_job(queue: WorkerQueue) -> str:
        while (id_ := await worker._next_job(queue)) is None:
            pass
        return id_

    async with connect(site.url) as redis:
        taking = asyncio.create_task(next_job(WorkerQueue(redis)))
        with site.suspended_valkey():
            await asyncio.to_thread(until, lambda: "Valkey does not answer" in caplog.text)
        await jobs.create(fixed())
        assert await taking == ID


async def test_a_worker_that_is_told_to_stop_leaves_the_entry_to_another(site: Plant, jobs: Jobs) -> None:
    worker = Worker(site.settings.model_copy(update={"redis_url": site.url}))
    await jobs.create(fixed())
    worker.stop()
    async with connect(site.url) as redis:
        queue = WorkerQueue(redis)
        assert await worker._next_job(queue) is None
        assert await queue.waiting() == {ID}


async def test_a_worker_with_another_store_takes_no_job(site: Plant, jobs: Jobs, tmp_path: Path) -> None:
    """It would not find the job's files, and say that they are gone."""
    redis = connect(site.url)
    await prove_identity(redis, Objects.open(site.settings.store_url))
    await redis.aclose()
    site.settings = site.settings.model_copy(update={"store": (tmp_path / "other").as_uri()})
    await jobs.create(fixed(ID))
    worker = site.start_worker(tmp_path / "child.py")
    assert await asyncio.to_thread(worker.wait, 60) == REFUSED
    assert "do not belong together" in site.log()
    assert (await jobs.get("t", ID)).phase == "queued"
