"""Files that appear complete or not at all, also if their writer is killed. Knows no content.

A file is written under a temporary name beside its own, then renamed or linked. `durable`: its bytes are
synced before it gets its name, and its folder afterwards; once the call returns, it survives a power failure.
Files that need not survive the machine, or are verified when read, are written without a sync.
"""

import contextlib
import os
import secrets
from collections.abc import Iterable
from pathlib import Path


def write_file(
    path: Path,
    chunks: Iterable[bytes | memoryview],
    *,
    only_if_absent: bool = False,
    mode: int = 0o666,
    durable: bool = True,
) -> bool:
    """Write `path`, which others may write at the same time. False if `only_if_absent` and the file exists.

    An error of `chunks` is raised, and nothing is written. The temporary file's name ends in "#" and digits,
    which obstore's listing leaves out; stale_temp_files.py removes those of killed writers.
    """
    make_folder(path.parent)
    temp = path.with_name(f"{path.name}#{secrets.randbits(63)}")
    try:
        temp.touch(mode, exist_ok=False)  # has its mode before it has a byte
        with temp.open("wb") as file:
            for chunk in chunks:
                file.write(chunk)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        if only_if_absent:
            os.link(temp, path)
        else:
            temp.replace(path)
    except FileExistsError:
        return False
    finally:
        temp.unlink(missing_ok=True)
        if durable:
            # also if another writer was first: its file may not be on disk yet, and the caller relies on that
            sync(path.parent)
    return True


def replace_file(path: Path, data: bytes, *, durable: bool = True) -> None:
    """Write the small file `path`, which has one writer: its next write replaces what a killed one left."""
    temp = path.with_name(f".{path.name}.partial")
    temp.write_bytes(data)
    if durable:
        sync(temp)
    temp.replace(path)
    if durable:
        sync(path.parent)


def remove_file(path: Path) -> None:
    """Remove `path` durably; nothing happens if it is not there."""
    path.unlink(missing_ok=True)
    with contextlib.suppress(FileNotFoundError):
        sync(path.parent)


def make_folder(path: Path) -> None:
    """Make `path` and its parents durably."""
    if path.is_dir():
        return
    make_folder(path.parent)
    path.mkdir(exist_ok=True)
    sync(path.parent)


def sync(path: Path) -> None:
    """Bring a file's bytes, or a folder's names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
