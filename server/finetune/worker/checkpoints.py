"""A job's checkpoints in the object store: files first, then the record in Valkey that names them.

A checkpoint exists once its record does, and only the holder of the job's lease can write a record. The
newest MAX_KEPT checkpoints keep their files; older ones are pruned to the record with its metrics.
"""

import logging
import time
from collections.abc import Iterable
from pathlib import Path

import msgspec

from adapters_store.object_store.store import Objects, sha256_of
from server.errors import CorruptObject, NotFound
from server.finetune.jobs.job import Checkpoint, Job, StoredFile, checkpoint_prefix
from server.finetune.jobs.leases import Leases

MAX_KEPT = 2  # the second newest is a spare, in case the newest cannot be read

log = logging.getLogger(__name__)


async def store_files(objects: Objects, paths: Iterable[Path], prefix: str) -> list[StoredFile]:
    """Store files, and the files of folders, as objects under `prefix` by their names. Idempotent.

    Raises StoreError.
    """
    stored = []
    for path in _files(paths):
        file = StoredFile(path.name, f"{prefix}/{path.name}", sha256_of(path), path.stat().st_size)
        await objects.put(file.key, path, file.sha256)
        stored.append(file)
    return stored


def _files(paths: Iterable[Path]) -> list[Path]:
    return sorted(file for path in paths for file in (path.iterdir() if path.is_dir() else [path]))


class Checkpoints:
    """All calls raise StoreError."""

    def __init__(self, leases: Leases, objects: Objects, job: Job) -> None:
        self._leases = leases
        self._objects = objects
        self._job = job

    async def save(self, folder: Path, step: int, metrics: dict[str, float]) -> bool:
        """Store the files of `folder` as the checkpoint of `step`. False if the lease is lost."""
        prefix = checkpoint_prefix(self._job, step, self._job.fence)
        files = await store_files(self._objects, [folder], prefix)
        checkpoint = Checkpoint(created=int(time.time()), step=step, metrics=metrics, files=files)
        return await self._leases.checkpoint(self._job.id, self._job.fence, checkpoint)

    async def prune(self, kept: int = MAX_KEPT) -> None:
        """Delete the files of all but the newest `kept` checkpoints."""
        for old in (await self._with_files())[kept:]:
            await self._delete_files(old)

    async def restore(self, parent: Path) -> Path | None:
        """Download the newest undamaged checkpoint to the folder parent/checkpoint-STEP; None without any.

        Raises CorruptObject if there are checkpoints and all of them are damaged.
        """
        failure: CorruptObject | None = None
        damaged = []
        for checkpoint in await self._with_files():
            folder = parent / f"checkpoint-{checkpoint.step}"
            try:
                for file in checkpoint.files:
                    await self._objects.download(file.key, folder / file.name, file.sha256)
            except (NotFound, CorruptObject) as error:  # a StoreError is no evidence of damage
                log.warning("Job %s: checkpoint %d: %s", self._job.id, checkpoint.step, error.message)
                failure = error if isinstance(error, CorruptObject) else failure
                damaged.append(checkpoint)
            else:
                for newer in damaged:
                    await self._delete_files(newer)
                return folder
        if failure:
            raise failure
        return None

    async def _delete_files(self, checkpoint: Checkpoint) -> None:
        """Remove the file names from the checkpoint's record, then the files."""
        pruned = msgspec.structs.replace(checkpoint, files=[])
        if await self._leases.checkpoint(self._job.id, self._job.fence, pruned):
            for file in checkpoint.files:
                await self._objects.delete(file.key)

    async def _with_files(self) -> list[Checkpoint]:
        """The checkpoints that are not pruned, the newest first."""
        checkpoints = await self._leases.checkpoints(self._job.id)
        return [checkpoint for checkpoint in checkpoints if checkpoint.files]
