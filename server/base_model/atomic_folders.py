"""Folders and files that appear complete or not at all, also if their writer is killed."""

import os
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock


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
            _sync(path)
        staging.rename(target)
        _sync(target.parent)
    return target


def write_atomically(path: Path, text: str) -> None:
    """Write a small file durably; a reader sees either the old content or the new."""
    staging = path.with_name(f".{path.name}.partial")
    staging.write_text(text)
    _sync(staging)
    staging.rename(path)
    _sync(path.parent)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
