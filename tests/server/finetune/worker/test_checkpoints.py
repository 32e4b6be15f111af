"""Checkpoints in a real store and a real Valkey: whole or invisible, and only of who holds the lease."""

from pathlib import Path

import pytest
from redis.asyncio import Redis

from adapters_store.object_store.store import Objects
from server.errors import StoreError
from server.finetune.jobs.job import Job, job_prefix
from server.finetune.jobs.jobs import Jobs
from server.finetune.worker.checkpoints import MAX_KEPT, Checkpoints
from tests.fixtures.jobs import fixed, lapse, taken

pytestmark = pytest.mark.anyio
FILES = {"adapter.safetensors": b"tensors", "optimizer.pt": b"moments", "trainer_state.json": b"{}"}


@pytest.fixture
async def job(jobs: Jobs) -> Job:
    await jobs.create(fixed())
    return await taken(jobs)


@pytest.fixture
def checkpoints(jobs: Jobs, objects: Objects, job: Job) -> Checkpoints:
    return Checkpoints(jobs, objects, job)


def written(folder: Path, step: int) -> Path:
    """What a trainer leaves at `step`."""
    folder = folder / f"trained-{step}"
    folder.mkdir()
    for name, data in FILES.items():
        (folder / name).write_bytes(data + str(step).encode())
    return folder


async def save(checkpoints: Checkpoints, folder: Path, *steps: int) -> None:
    for step in steps:
        assert await checkpoints.save(written(folder, step), step, {"step": step, "train_loss": 1.5})


async def restored(checkpoints: Checkpoints, folder: Path) -> int | None:
    """The step one would go on from, once its files have been compared."""
    found = await checkpoints.restore(folder)
    if found is None:
        return None
    step = int(found.name.removeprefix("checkpoint-"))
    assert {path.name: path.read_bytes() for path in found.iterdir()} == {
        name: data + str(step).encode() for name, data in FILES.items()
    }
    return step


async def test_the_newest_is_where_to_go_on(checkpoints: Checkpoints, tmp_path: Path) -> None:
    assert await restored(checkpoints, tmp_path) is None
    await save(checkpoints, tmp_path, 5, 10)
    assert await restored(checkpoints, tmp_path) == 10


async def test_what_was_cut_off_does_not_exist(
    checkpoints: Checkpoints, tmp_path: Path, objects: Objects, monkeypatch: pytest.MonkeyPatch
) -> None:
    await save(checkpoints, tmp_path, 5)
    put = objects.put

    async def put_two(key: str, source: Path | bytes, sha256: str | None = None) -> None:
        if key.endswith("trainer_state.json"):
            raise StoreError("Gone.")
        await put(key, source, sha256)

    monkeypatch.setattr(objects, "put", put_two)
    with pytest.raises(StoreError):
        await save(checkpoints, tmp_path, 10)
    assert await restored(checkpoints, tmp_path) == 5


@pytest.mark.parametrize("damage", ["changed", "gone"])
async def test_a_damaged_one_is_passed_over(
    damage: str, checkpoints: Checkpoints, tmp_path: Path, objects: Objects, jobs: Jobs, job: Job
) -> None:
    await save(checkpoints, tmp_path, 5, 10)
    victim = (await jobs.checkpoints(job.id))[0].files[1].key
    await (objects.put(victim, b"nonsense") if damage == "changed" else objects.delete(victim))
    assert await restored(checkpoints, tmp_path) == 5


async def test_a_store_that_is_away_is_no_reason_to_begin_anew(
    checkpoints: Checkpoints, tmp_path: Path, objects: Objects, monkeypatch: pytest.MonkeyPatch
) -> None:
    await save(checkpoints, tmp_path, 5)

    async def away(*_: object) -> None:
        raise StoreError("Away.")

    monkeypatch.setattr(objects, "download", away)
    with pytest.raises(StoreError):
        await checkpoints.restore(tmp_path)


async def test_old_ones_keep_their_figures_and_lose_their_files(
    checkpoints: Checkpoints, tmp_path: Path, objects: Objects, jobs: Jobs, job: Job
) -> None:
    await save(checkpoints, tmp_path, 1, 2, 3, 4)
    await checkpoints.prune()
    found = await jobs.checkpoints(job.id)
    assert [(c.step, len(c.files), c.metrics["train_loss"]) for c in found] == [
        (4, 3, 1.5),
        (3, 3, 1.5),
        (2, 0, 1.5),
        (1, 0, 1.5),
    ]
    left = await objects.list(job_prefix(job.tenant, job.id))
    assert left == sorted(file.key for c in found for file in c.files)
    assert len(left) == MAX_KEPT * len(FILES)


async def test_without_the_lease_nothing_is_written_or_removed(
    checkpoints: Checkpoints, tmp_path: Path, objects: Objects, jobs: Jobs, job: Job, redis: Redis
) -> None:
    await save(checkpoints, tmp_path, 1, 2, 3)
    await lapse(redis)
    await jobs.sweep()
    successor = Checkpoints(jobs, objects, await taken(jobs, worker="w2"))
    assert not await checkpoints.save(written(tmp_path, 9), 9, {})
    await checkpoints.prune()
    assert [len(c.files) for c in await jobs.checkpoints(job.id)] == [3, 3, 3]
    assert await restored(successor, tmp_path) == 3
