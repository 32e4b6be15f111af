"""Files that appear whole or not at all, and stay: write a draft, fsync, link or rename, fsync the folder.

obstore's LocalStore renames without fsync, so what it acknowledged can vanish with the power. Writes to a
file:// store and to the disk tier come through here; so do its small reads, which obstore's threads, that
have no low priority, would take from the rows that run.
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


def chunks_of(source: Path | bytes, size: int) -> Iterator[bytes]:
    if isinstance(source, bytes):
        yield source
        return
    with source.open("rb") as file:
        while chunk := file.read(size):
            yield chunk


def within_deadline(chunks: Iterator[bytes], seconds: float) -> Iterator[bytes]:
    """`chunks`, as long as they come within the time; StoreError after it."""
    end = time.monotonic() + seconds
    for chunk in chunks:
        if time.monotonic() > end:
            raise StoreError(f"A transfer took longer than {seconds:.0f} s; it was given up.")
        yield chunk


DAMAGED = "Stored bytes do not match their SHA-256; they were not used."
HASHED = 1 << 20  # bytes at a time: hashed while they are in the processor's cache


def write_file(
    path: Path, chunks: Iterable[bytes], sha256: str | None = None, *, only_if_absent: bool = False
) -> bool:
    """Write `path` durably. False if it had to be absent and was not; CorruptObject if `sha256` is another's.

    The draft lies beside its target under a name obstore's listing leaves out ("#" and digits at its end).
    """
    make_folder(path.parent)
    draft = path.with_name(f"{path.name}#{secrets.randbits(63)}")
    try:
        with draft.open("xb") as file:
            for chunk in verified(chunks, sha256):
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        if only_if_absent:
            os.link(draft, path)
        else:
            draft.replace(path)
    except FileExistsError:
        return False
    finally:
        draft.unlink(missing_ok=True)
        # also when somebody else was first: their file may not be on disk yet, and we are about to say it is
        _sync_folder(path.parent)
    return True


def read_file(path: Path, most: int) -> bytes:
    """All of `path`; TooLarge over `most` bytes, FileNotFoundError for a folder, too."""
    try:
        with path.open("rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            if size > most:
                raise TooLarge(f"A stored object has {size} bytes, more than {most}.")
            return file.readall()
    except (IsADirectoryError, NotADirectoryError) as error:
        raise FileNotFoundError from error


def remove_file(path: Path) -> None:
    """Remove `path` durably; nothing happens if it is not there."""
    path.unlink(missing_ok=True)
    with contextlib.suppress(FileNotFoundError):
        _sync_folder(path.parent)


def make_folder(path: Path) -> None:
    """Make `path` and its parents, each durable in its own parent."""
    if path.is_dir():
        return
    make_folder(path.parent)
    path.mkdir(exist_ok=True)
    _sync_folder(path.parent)


def verified(chunks: Iterable[bytes], sha256: str | None) -> Iterator[bytes]:
    """`chunks` as they are; CorruptObject at their end if they are not what `sha256` names."""
    digest = hashlib.sha256()
    for chunk in chunks:
        digest.update(chunk)
        yield chunk
    if sha256 is not None and digest.hexdigest() != sha256:
        raise CorruptObject(DAMAGED)


class ReadInto(Protocol):
    def __call__(self, buffer: memoryview, /) -> int | None: ...


def read_into(buffer: memoryview, read_into: ReadInto, sha256: str) -> bool:
    """Fill `buffer` from a file's `readinto`; whether it got all, and that is what `sha256` names."""
    digest, at = hashlib.sha256(), 0
    while at < len(buffer):
        count = read_into(buffer[at : at + HASHED])
        if not count:
            return False
        digest.update(buffer[at : at + count])
        at += count
    return digest.hexdigest() == sha256


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
