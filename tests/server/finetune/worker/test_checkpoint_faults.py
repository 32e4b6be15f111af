"""Every call to the store fails once while a checkpoint is saved, restored or pruned."""

import contextlib
from pathlib import Path

import pytest

from adapters_store.object_store.store import Objects
from server.errors import StoreError
from server.finetune.jobs.jobs import Jobs
from server.finetune.worker.checkpoints import Checkpoints
from tests.fixtures.faults import StoreFaults
from tests.fixtures.jobs import fixed, taken
from tests.fixtures.s3 import Weed
from tests.server.finetune.worker.test_checkpoints import FILES, restored, written

pytestmark = pytest.mark.anyio


@pytest.fixture(params=["file", "s3"])
def objects(request: pytest.FixtureRequest, tmp_path: Path) -> Objects:
    if request.param == "file":
        return Objects.open((tmp_path / "store").as_uri())
    weed: Weed = request.getfixturevalue("weed")
    return weed.open()


@pytest.fixture
async def checkpoints(jobs: Jobs, objects: Objects) -> Checkpoints:
    await jobs.create(fixed())
    return Checkpoints(jobs, objects, await taken(jobs))


async def test_a_checkpoint_whose_kth_call_fails(
    checkpoints: Checkpoints, tmp_path: Path, store_faults: StoreFaults
) -> None:
    """What was acknowledged is where to go on; what was not is there whole or not at all; then it works."""
    acknowledged: int | None = None
    for step, _ in enumerate(store_faults.each(), 1):
        folder = written(tmp_path, step)
        try:
            assert await checkpoints.save(folder, step, {"step": step})
            acknowledged = step
            await checkpoints.prune()
        except StoreError:
            assert store_faults.failed
        with store_faults.paused():
            found = await restored(checkpoints, tmp_path / f"then-{step}-{store_faults.met}")
            assert found in (acknowledged, step)
            assert found is None or found >= (acknowledged or 0)
            assert await checkpoints.save(folder, step, {"step": step})
            await checkpoints.prune()
            acknowledged = step
            assert await restored(checkpoints, tmp_path / f"after-{step}-{store_faults.met}") == step
    assert store_faults.met >= 2 * len(FILES)


async def test_a_restore_whose_kth_call_fails(
    checkpoints: Checkpoints, tmp_path: Path, store_faults: StoreFaults
) -> None:
    """It fails, and finds the newest one when it is asked again: a store that failed is no damage."""
    step = 0
    for k, when in store_faults.each():
        with store_faults.paused():
            for _ in range(2):
                step += 1
                assert await checkpoints.save(written(tmp_path, step), step, {"step": step})
            await checkpoints.prune()
        with contextlib.suppress(StoreError):
            assert await restored(checkpoints, tmp_path / f"{when}-{k}") == step
        with store_faults.paused():
            assert await restored(checkpoints, tmp_path / f"{when}-{k}-again") == step
    assert store_faults.met >= 2 * len(FILES)
