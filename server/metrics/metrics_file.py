"""One process's figures in a file that other processes read, in prometheus_client's format.

The library maps such a file into memory, and a page of it for which the disk has no room ends the process
with SIGBUS. Here values lie in this process's own memory and are copied to the file by plain writes: one that
fails is given up, and about a second later, with the next value, the whole file is tried again.
"""

import contextlib
import os
import struct
import time
from pathlib import Path

from prometheus_client import values
from prometheus_client.mmap_dict import MmapedDict

AGAIN_SECONDS = 1.0
HEADER = 8  # bytes: how many of the file are in use, and padding
PAIR = struct.Struct("dd")  # a value and its timestamp
SIZE = 1 << 16  # bytes of a new file, a hole at first, so that a reader never finds less than a header


class MetricsFile:
    """What prometheus_client wants of its MmapedDict for writing. It makes every call under one lock."""

    def __init__(self, filename: str) -> None:
        self._path = Path(filename)
        self._image = bytearray(struct.pack("ii", HEADER, 0))  # what the file shall hold
        self._positions: dict[str, int] = {}  # of each key's PAIR
        self._descriptor: int | None = None
        self._behind = True  # the file does not hold all of the image
        self._next_try = 0.0  # time.monotonic()
        with contextlib.suppress(OSError):  # of an earlier process of this number: its counters go on
            for key, value, timestamp, _ in MmapedDict.read_all_values_from_file(filename):  # type: ignore[no-untyped-call]
                self._add(key, value, timestamp)

    def read_value(self, key: str) -> tuple[float, float]:
        """A value and its timestamp; of a new key 0, which from now on is in the file."""
        if key not in self._positions:
            self._append(key)
        value, timestamp = PAIR.unpack_from(self._image, self._positions[key])
        return value, timestamp

    def write_value(self, key: str, value: float, timestamp: float) -> None:
        if key not in self._positions:
            self._append(key)
        at = self._positions[key]
        PAIR.pack_into(self._image, at, value, timestamp)
        self._write(at, at + PAIR.size)

    def close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
            self._behind = True

    def _append(self, key: str) -> None:
        start = len(self._image)
        self._add(key, 0.0, 0.0)
        self._write(start, len(self._image))
        self._write(0, HEADER)  # only now a reader looks for it

    def _add(self, key: str, value: float, timestamp: float) -> None:
        text = key.encode()
        padded = text + b" " * (8 - (len(text) + 4) % 8)
        self._image += struct.pack("i", len(text)) + padded
        self._positions[key] = len(self._image)
        self._image += PAIR.pack(value, timestamp)
        struct.pack_into("i", self._image, 0, len(self._image))

    def _write(self, start: int, end: int) -> None:
        """Copy these bytes to the file, or all of them if some are missing there."""
        try:
            if not self._behind and self._descriptor is not None:
                self._copy(self._descriptor, start, end)
            elif time.monotonic() >= self._next_try:
                self._next_try = time.monotonic() + AGAIN_SECONDS
                if self._descriptor is None:
                    self._descriptor = self._opened()
                self._copy(self._descriptor, HEADER, len(self._image))
                self._copy(self._descriptor, 0, HEADER)
                self._behind = False
        except OSError:
            self._behind = True

    def _copy(self, descriptor: int, start: int, end: int) -> None:
        written = os.pwrite(descriptor, self._image[start:end], start)
        if written < end - start:
            raise OSError("the disk is full")

    def _opened(self) -> int:
        self._path.parent.mkdir(mode=0o700, exist_ok=True)
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            if os.fstat(descriptor).st_size < SIZE:
                os.ftruncate(descriptor, SIZE)
        except OSError:
            os.close(descriptor)
            self._path.unlink(missing_ok=True)
            raise
        return descriptor


def write_figures_without_mapping() -> None:
    """From now on in this process. The library looks its class up here whenever it opens a file."""
    values.MmapedDict = MetricsFile  # type: ignore[assignment, attr-defined]
