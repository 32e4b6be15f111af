"""Journals: files of records that outlive the process that writes them. Knows no Valkey.

    {folder}/{journal id}.journal    a JSON Record a line

An API process appends to its journal, under a lock that ends with the process; the engine writes whole files
and holds none. A line counts once it ends in a newline: a write that was cut short is no record.
"""

import contextlib
import fcntl
import logging
import os
import time
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Self

import msgspec

from server.atomic_files import make_folder, remove_file, write_file
from server.usage.record import CUT, OPEN, Record

SUFFIX = ".journal"
MAX_BYTES = 64 << 20
PARTIAL_SECONDS = 60.0  # a file is written in less
log = logging.getLogger(__name__)


def write_journal(folder: Path, records: Iterable[Record]) -> None:
    """Write a whole journal, which no process holds. Raises OSError."""
    write_file(_path(folder, uuid.uuid4().hex), map(_line, records), mode=0o600, durable=False)


class Journal:
    """The journal of this process. Its file exists from the first record to `close`."""

    def __init__(self, folder: Path) -> None:
        self.id = uuid.uuid4().hex
        self.bytes = 0
        self._path = _path(folder, self.id)
        self._descriptor: int | None = None

    def append(self, records: Iterable[Record]) -> None:
        """Add lines that outlive this process, not yet the machine. Raises OSError, and adds none."""
        data = b"".join(map(_line, records))
        if self.bytes + len(data) > MAX_BYTES:
            raise OSError(f"the journal has over {MAX_BYTES} bytes")
        if self._descriptor is None:
            self._descriptor = _open_locked(self._path)
        try:
            _write(self._descriptor, data)
        except OSError:
            os.ftruncate(self._descriptor, self.bytes)
            raise
        self.bytes += len(data)

    def replace(self, records: Iterable[Record]) -> None:
        """Have these lines alone, from one moment to the next. Raises OSError, and changes nothing."""
        data = b"".join(map(_line, records))
        temp = self._path.with_suffix(".partial")
        descriptor = _open_locked(temp)
        try:
            os.ftruncate(descriptor, 0)
            _write(descriptor, data)
            temp.rename(self._path)
        except BaseException:
            os.close(descriptor)
            temp.unlink(missing_ok=True)
            raise
        before, self._descriptor, self.bytes = self._descriptor, descriptor, len(data)
        if before is not None:
            os.close(before)

    def sync(self) -> None:
        """Bring all lines to the disk. Raises OSError."""
        if self._descriptor is not None:
            os.fsync(self._descriptor)

    def close(self, *, remove: bool) -> None:
        """`remove`: all its records are in the sums; otherwise it is left to the next process."""
        if self._descriptor is None:
            return
        if remove:
            self._path.unlink(missing_ok=True)
        os.close(self._descriptor)
        self._descriptor = None


class Leftover:
    """A journal whose writer is gone, held by this process."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self.id = path.name.removesuffix(SUFFIX)
        self.records = _ended(_read(path))
        self._path = path
        self._descriptor = descriptor

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)

    def remove(self) -> None:
        """All its records are in the sums. Raises OSError."""
        remove_file(self._path)


def leftovers(folder: Path) -> Iterator[Leftover]:
    """The journals that nobody holds, the oldest first. Each must be closed."""
    for path in sorted(folder.glob(f"*{SUFFIX}"), key=_modified):
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except FileNotFoundError:  # another process was first
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not _same_file(path, descriptor):
                raise BlockingIOError
            leftover = Leftover(path, descriptor)
        except (BlockingIOError, FileNotFoundError):
            os.close(descriptor)
            continue
        yield leftover


def remove_partial_files(folder: Path) -> None:
    """Remove what killed processes left half written."""
    for path in [*folder.glob("*.partial"), *folder.glob(f"*{SUFFIX}#*")]:
        if _modified(path) < time.time() - PARTIAL_SECONDS:
            path.unlink(missing_ok=True)


def _ended(lines: list[Record]) -> list[Record]:
    """All that ended, by number. What was open is cut: the same numbers, whoever reads it and how often."""
    last = {record.id: record for record in lines}
    number = max((record.number for record in lines), default=0)
    ended = sorted((r for r in last.values() if r.outcome != OPEN), key=lambda record: record.number)
    for record in last.values():
        if record.outcome == OPEN:
            number += 1
            ended.append(msgspec.structs.replace(record, number=number, outcome=CUT))
    return ended


def _read(path: Path) -> list[Record]:
    records, damaged = [], 0
    for line in path.read_bytes().split(b"\n")[:-1]:
        try:
            records.append(msgspec.json.decode(line, type=Record))
        except msgspec.DecodeError:
            damaged += 1
    if damaged:
        log.error("%d lines of a journal of usage are damaged and are not counted", damaged)
    return records


def _line(record: Record) -> bytes:
    return msgspec.json.encode(record) + b"\n"


def _path(folder: Path, id_: str) -> Path:
    return folder / f"{id_}{SUFFIX}"


def _modified(path: Path) -> float:
    with contextlib.suppress(FileNotFoundError):
        return path.stat().st_mtime
    return 0.0


def _open_locked(path: Path) -> int:
    """Open `path` for appending, and hold it. Whoever looks for leftovers may have been first."""
    make_folder(path.parent)
    while True:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        if _same_file(path, descriptor):
            return descriptor
        os.close(descriptor)


def _same_file(path: Path, descriptor: int) -> bool:
    """Whether `path` is still the name of the open file."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return False
    mine = os.fstat(descriptor)
    return (found.st_dev, found.st_ino) == (mine.st_dev, mine.st_ino)


def _write(descriptor: int, data: bytes) -> None:
    while data:
        data = data[os.write(descriptor, data) :]
