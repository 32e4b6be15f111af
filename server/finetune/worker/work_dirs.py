"""The folder a worker's jobs compute in: theirs alone, empty at the start, gone when the worker is.

{data_dir}/finetune/{worker}/lock    held as long as the worker lives
{data_dir}/finetune/{worker}/{job}   of the job it has
"""

import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

LOCK = "lock"
log = logging.getLogger(__name__)


@contextmanager
def worker_dir(root: Path, name: str) -> Iterator[Path]:
    """root/name, made; what workers that were killed have left beside it is removed."""
    folder = root / name
    folder.mkdir(mode=0o700, parents=True)
    with FileLock(folder / LOCK):
        for other in root.iterdir():
            if other != folder:
                _remove_if_orphaned(other)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def attempt_dir(worker_dir: Path, job: str) -> Iterator[Path]:
    """An empty folder for one attempt at a job."""
    folder = worker_dir / job
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(mode=0o700)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def bytes_in(folder: Path) -> int:
    """Of all files below; those that vanish meanwhile do not count."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):
                total += (Path(place) / name).lstat().st_size
    return total


def _remove_if_orphaned(folder: Path) -> None:
    """A worker that has just made its folder may not have locked it yet: without a lock file, hands off."""
    if not (folder / LOCK).exists():
        return
    try:
        with FileLock(folder / LOCK, timeout=0):
            shutil.rmtree(folder, ignore_errors=True)
            log.info("Removed what a killed worker left in %s", folder.name)
    except (Timeout, OSError):
        return
