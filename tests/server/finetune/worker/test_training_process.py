"""What a training process says to its job when its disk is full."""

import errno
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from anyio.from_thread import BlockingPortal, start_blocking_portal

from server.errors import InvalidField
from server.finetune.jobs.job import Job
from server.finetune.worker import training_process as module
from server.finetune.worker.training_process import TrainingProcess
from server.settings import Settings
from tests.fixtures.jobs import fixed
from tests.fixtures.services import empty

ID = "ftjob-1"


@pytest.fixture
def portal() -> Iterator[BlockingPortal]:
    with start_blocking_portal("asyncio") as it:
        yield it


@pytest.fixture
def session(portal: BlockingPortal, valkey_url: str, tmp_path: Path) -> Iterator[TrainingProcess]:
    empty(valkey_url)
    it = TrainingProcess(Settings(redis_url=valkey_url, data_dir=tmp_path), portal, tmp_path)
    portal.call(it.jobs.create, fixed(ID))
    yield it
    portal.call(it.jobs._redis.aclose)


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("PytorchStreamWriter failed writing file"),
    ],
)
def test_it_waits_for_room_and_the_job_goes_on(
    session: TrainingProcess, portal: BlockingPortal, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    looks = iter([0, 0, 0, 1 << 30])
    free = [0]

    def disk_usage(_folder: Path) -> Any:
        free[0] = next(looks, free[0])
        return shutil._ntuple_diskusage(1 << 40, 0, free[0])

    def train(_job: Job) -> bool:
        raise error

    monkeypatch.setattr(module, "DISK_POLL_SECONDS", 0.0)
    monkeypatch.setattr(shutil, "disk_usage", disk_usage)
    monkeypatch.setattr(session, "_train", train)
    job = portal.call(session.jobs.take, ID, "worker")
    assert job is not None
    assert session.run(job) == 0
    assert free == [1 << 30], "it waited"
    found = portal.call(session.jobs.find, ID)
    assert found is not None
    assert (found.phase, found.error) == ("queued", None)


def test_what_the_data_are_to_blame_for_fails_also_on_a_full_disk(
    session: TrainingProcess, portal: BlockingPortal, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(_job: Job) -> bool:
        raise InvalidField("training_file has no example to train on.", param="training_file")

    usage = shutil._ntuple_diskusage(1 << 40, 0, 0)
    monkeypatch.setattr(shutil, "disk_usage", lambda _folder: usage)
    monkeypatch.setattr(session, "_train", train)
    job = portal.call(session.jobs.take, ID, "worker")
    assert job is not None
    session.run(job)
    found = portal.call(session.jobs.find, ID)
    assert found is not None
    assert found.status == "failed"
