"""A job's checkpoints: a folder that the trainer wrote, as objects; the record that names them comes last.

A checkpoint without its record does not exist, and only who holds the job's lease can write one. The newest
KEPT keep their files; of the others the record stays, with what was measured there.
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

KEPT = 2  # the one before the newest is there in case that one cannot be read

log = logging.getLogger(__name__)


async def store_files(objects: Objects, paths: Iterable[Path], prefix: str) -> list[StoredFile]:
    """Each file, and those in each folder, as objects under `prefix`, by their own names. Raises StoreError.

    Once more does no harm.
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
        """Keep what is in `folder`. False if the lease is lost: then nothing is left to do for the job."""
        prefix = checkpoint_prefix(self._job, step, self._job.fence)
        files = await store_files(self._objects, [folder], prefix)
        made = Checkpoint(created=int(time.time()), step=step, metrics=metrics, files=files)
        return await self._leases.checkpoint(self._job.id, self._job.fence, made)

    async def prune(self, kept: int = KEPT) -> None:
        """Remove the files of all but the newest ones."""
        for old in (await self._with_files())[kept:]:
            await self._strip(old)

    async def restore(self, parent: Path) -> Path | None:
        """The newest checkpoint that is there and whole, as a folder checkpoint-STEP; None without any.

        Raises CorruptObject when one is there and none is whole.
        """
        failure: CorruptObject | None = None
        damaged = []
        for checkpoint in await self._with_files():
            folder = parent / f"checkpoint-{checkpoint.step}"
            try:
                for file in checkpoint.files:
                    await self._objects.download(file.key, folder / file.name, file.sha256)
            except (NotFound, CorruptObject) as error:  # a store that is slow or away says nothing of it
                log.warning("Job %s: checkpoint %d: %s", self._job.id, checkpoint.step, error.message)
                failure = error if isinstance(error, CorruptObject) else failure
                damaged.append(checkpoint)
            else:
                for other in damaged:
                    await self._strip(other)
                return folder
        if failure:
            raise failure
        return None

    async def _strip(self, checkpoint: Checkpoint) -> None:
        """Remove its files, and before that their names from its record."""
        bare = msgspec.structs.replace(checkpoint, files=[])
        if await self._leases.checkpoint(self._job.id, self._job.fence, bare):
            for file in checkpoint.files:
                await self._objects.delete(file.key)

    async def _with_files(self) -> list[Checkpoint]:
        """Those one can go on from, the newest first."""
        return [found for found in await self._leases.checkpoints(self._job.id) if found.files]
