"""Streams of chunks with a digest and a deadline, and reads of a file:// store.

obstore's own threads would read a file:// store with normal priority, and take processor time from the
running batch. Its LocalStore renames without fsync, so a power failure can lose a write that it has
acknowledged: writes to a file:// store use server/atomic_files.py.
"""

import hashlib
import os
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
