"""Streams of chunks with a digest and a deadline, and durable, atomic writes of files.

A write goes to a temporary file, which is synced, then linked or renamed, and its folder synced. obstore's
LocalStore renames without fsync, so a power failure can lose a write that it has acknowledged. Writes to a
file:// store and to the disk tier use this module. So do reads of a file:// store: obstore's own threads have
normal priority, and would take processor time from the running batch.
"""

import contextlib
import hashlib
import os
import secrets
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Protocol

from server.errors import CorruptObject, StoreError, TooLarge

DAMAGED = "Stored bytes do not match their SHA-256; they were not used."
HASH_BYTES = 1 << 20  # hashed at a time, while they are in the processor's cache


def chunks_of(source: Path | bytes, size: int) -> Iterator[bytes]:
    """A file in chunks of `size` bytes; bytes as one chunk."""
    if isinstance(source, bytes):
        yield source
        return
    with source.open("rb") as file:
        while chunk := file.read(size):
            yield chunk


def within_deadline(chunks: Iterator[bytes], seconds: float) -> Iterator[bytes]:
    """`chunks`. Raises StoreError at the first that comes later than `seconds` from now."""
    end = time.monotonic() + seconds
    for chunk in chunks:
        if time.monotonic() > end:
            raise StoreError(f"A transfer took longer than {seconds:.0f} s; it was given up.")
        yield chunk


def write_file(
    path: Path, chunks: Iterable[bytes], sha256: str | None = None, *, only_if_absent: bool = False
) -> bool:
    """Write `path` durably. False if `only_if_absent` and the file exists.

    Raises CorruptObject if the bytes' digest is not `sha256`; then nothing is written. The temporary file is
    beside its target; its name ends in "#" and digits, which obstore's listing leaves out.
    """
    make_folder(path.parent)
    temp = path.with_name(f"{path.name}#{secrets.randbits(63)}")
    try:
        with temp.open("xb") as file:
            for chunk in verified(chunks, sha256):
                file.write(chunk)
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
        # also if another writer was first: its file may not be on disk yet, and the caller relies on that
        _sync_folder(path.parent)
    return True


def read_file(path: Path, max_bytes: int) -> bytes:
    """The content of `path`. Raises TooLarge over `max_bytes`; FileNotFoundError, for a folder, too."""
    try:
        with path.open("rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            if size > max_bytes:
                raise TooLarge(f"A stored object has {size} bytes, more than {max_bytes}.")
            return file.readall()
    except (IsADirectoryError, NotADirectoryError) as error:
        raise FileNotFoundError from error


def remove_file(path: Path) -> None:
    """Remove `path` durably; nothing happens if it is not there."""
    path.unlink(missing_ok=True)
    with contextlib.suppress(FileNotFoundError):
        _sync_folder(path.parent)


def make_folder(path: Path) -> None:
    """Make `path` and its parents durably."""
    if path.is_dir():
        return
    make_folder(path.parent)
    path.mkdir(exist_ok=True)
    _sync_folder(path.parent)


def verified(chunks: Iterable[bytes], sha256: str | None) -> Iterator[bytes]:
    """`chunks`, unchanged. Raises CorruptObject after the last if their digest is not `sha256`; None: any."""
    digest = hashlib.sha256()
    for chunk in chunks:
        digest.update(chunk)
        yield chunk
    if sha256 is not None and digest.hexdigest() != sha256:
        raise CorruptObject(DAMAGED)


class ReadInto(Protocol):
    """A file's `readinto`: the number of bytes that were read, 0 or None at the end."""

    def __call__(self, buffer: memoryview, /) -> int | None: ...


def read_into(buffer: memoryview, readinto: ReadInto, sha256: str) -> bool:
    """Fill `buffer`. False if the file is too short or the bytes' digest is not `sha256`."""
    digest, filled = hashlib.sha256(), 0
    while filled < len(buffer):
        count = readinto(buffer[filled : filled + HASH_BYTES])
        if not count:
            return False
        digest.update(buffer[filled : filled + count])
        filled += count
    return digest.hexdigest() == sha256


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
