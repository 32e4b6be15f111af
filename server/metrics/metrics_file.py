"""One process's metrics in a file that other processes read, in prometheus_client's format.

The library maps such a file into memory; on a full disk, touching a new page ends the process with SIGBUS.
Here values are in this process's memory and are copied to the file by plain writes. After a write that fails,
the whole file is written again with the next value, at most once in RETRY_SECONDS.
"""

import contextlib
import os
import struct
import time
from pathlib import Path

from prometheus_client import values
from prometheus_client.mmap_dict import MmapedDict

RETRY_SECONDS = 1.0
HEADER_BYTES = 8  # the number of bytes in use, and padding
PAIR = struct.Struct("dd")  # a value and its timestamp
INITIAL_BYTES = 1 << 16  # of a new file, a hole at first: a reader never finds less than a header


class MetricsFile:
    """The part of MmapedDict that prometheus_client uses for writing. It holds a lock during each call."""

    def __init__(self, filename: str) -> None:
        self._path = Path(filename)
        self._image = bytearray(struct.pack("ii", HEADER_BYTES, 0))  # the content that the file is to have
        self._positions: dict[str, int] = {}  # of each key's PAIR
        self._descriptor: int | None = None
        self._behind = True  # the file lacks some of the image
        self._next_try = 0.0  # time.monotonic()
        with contextlib.suppress(
            OSError
        ):  # written by an earlier process of this number: its counters continue
            for key, value, timestamp, _ in MmapedDict.read_all_values_from_file(filename):  # type: ignore[no-untyped-call]
                self._add(key, value, timestamp)

    def read_value(self, key: str) -> tuple[float, float]:
        """A value and its timestamp; a new key is added with 0."""
        if key not in self._positions:
            self._append(key)
        value, timestamp = PAIR.unpack_from(self._image, self._positions[key])
        return value, timestamp

    def write_value(self, key: str, value: float, timestamp: float) -> None:
        if key not in self._positions:
            self._append(key)
        position = self._positions[key]
        PAIR.pack_into(self._image, position, value, timestamp)
        self._write(position, position + PAIR.size)

    def close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
            self._behind = True

    def _append(self, key: str) -> None:
        start = len(self._image)
        self._add(key, 0.0, 0.0)
        self._write(start, len(self._image))
        self._write(0, HEADER_BYTES)  # from now on readers see the key

    def _add(self, key: str, value: float, timestamp: float) -> None:
        text = key.encode()
        padded = text + b" " * (8 - (len(text) + 4) % 8)
        self._image += struct.pack("i", len(text)) + padded
        self._positions[key] = len(self._image)
        self._image += PAIR.pack(value, timestamp)
        struct.pack_into("i", self._image, 0, len(self._image))

    def _write(self, start: int, end: int) -> None:
        """Copy image[start:end] to the file, or the whole image if the file is behind. Raises nothing."""
        try:
            if not self._behind and self._descriptor is not None:
                self._copy(self._descriptor, start, end)
            elif time.monotonic() >= self._next_try:
                self._next_try = time.monotonic() + RETRY_SECONDS
                if self._descriptor is None:
                    self._descriptor = self._open()
                self._copy(self._descriptor, HEADER_BYTES, len(self._image))
                self._copy(self._descriptor, 0, HEADER_BYTES)
                self._behind = False
        except OSError:
            self._behind = True

    def _copy(self, descriptor: int, start: int, end: int) -> None:
        written = os.pwrite(descriptor, self._image[start:end], start)
        if written < end - start:
            raise OSError("the disk is full")

    def _open(self) -> int:
        self._path.parent.mkdir(mode=0o700, exist_ok=True)
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            if os.fstat(descriptor).st_size < INITIAL_BYTES:
                os.ftruncate(descriptor, INITIAL_BYTES)
        except OSError:
            os.close(descriptor)
            self._path.unlink(missing_ok=True)
            raise
        return descriptor


def write_metrics_without_mapping() -> None:
    """Make prometheus_client use MetricsFile in this process: it looks its class up for each file."""
    values.MmapedDict = MetricsFile  # type: ignore[assignment, attr-defined]
