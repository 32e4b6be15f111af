"""The work folders of a worker and its attempts. A killed worker's are removed by the next that starts.

{data_dir}/finetune/{worker}/lock    a file lock, held while the worker lives
{data_dir}/finetune/{worker}/{job}   the folder of the running attempt
"""

import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

LOCK_FILE = "lock"
log = logging.getLogger(__name__)


@contextmanager
def worker_dir(root: Path, name: str) -> Iterator[Path]:
    """Create root/name for the block, and remove the folders of killed workers beside it."""
    folder = root / name
    folder.mkdir(mode=0o700, parents=True)
    with FileLock(folder / LOCK_FILE):
        for sibling in root.iterdir():
            if sibling != folder:
                _remove_if_orphaned(sibling)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def attempt_dir(worker_dir: Path, job: str) -> Iterator[Path]:
    """Create an empty folder for one attempt at a job, for the length of the block."""
    folder = worker_dir / job
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(mode=0o700)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def bytes_in(folder: Path) -> int:
    """Total size of all files under `folder`; files that vanish meanwhile count 0."""
    total = 0
    for directory, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):
                total += (Path(directory) / name).lstat().st_size
    return total


def _remove_if_orphaned(folder: Path) -> None:
    """Remove the folder if its lock is free. Without a lock file its worker may be about to lock it."""
    if not (folder / LOCK_FILE).exists():
        return
    try:
        with FileLock(folder / LOCK_FILE, timeout=0):
            shutil.rmtree(folder, ignore_errors=True)
            log.info("Removed what a killed worker left in %s", folder.name)
    except (Timeout, OSError):
        return
