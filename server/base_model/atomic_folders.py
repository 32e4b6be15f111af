"""Folders and files that are complete or absent, whoever makes them and whenever it is cut."""

import os
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock


def build_once(target: Path, build: Callable[[Path], None]) -> Path:
    """`target`, filled by `build(staging)` if it is not there yet.

    Two starters wait for each other. `staging` may hold what a cut run left: `build` resumes or clears it.
    The rename comes last, after everything is on the disk, so a folder that exists is whole.
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


def write_whole(path: Path, text: str) -> None:
    """Write a small file so that a reader sees the old content or the new, never a half."""
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
