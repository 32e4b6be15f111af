"""Folders that appear complete or not at all, also if their writer is killed."""

from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from server.atomic_files import sync


def build_once(target: Path, build: Callable[[Path], None]) -> Path:
    """`target`, which `build(staging)` fills if it does not exist.

    Concurrent calls wait for each other. `staging` may hold files of an interrupted call, which `build`
    resumes or clears. The rename comes last, after all files are synced, so an existing folder is complete.
    """
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(target.with_name(f".{target.name}.lock")):
        if target.is_dir():
            return target
        staging = target.with_name(f".{target.name}.partial")
        staging.mkdir(exist_ok=True)
        build(staging)
        for path in [*staging.rglob("*"), staging]:
            sync(path)
        staging.rename(target)
        sync(target.parent)
    return target
