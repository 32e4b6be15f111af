"""Bytes on their way, a chunk at a time."""

import time
from collections.abc import Iterator
from pathlib import Path

from server.errors import StoreError


def chunks_of(source: Path | bytes, size: int) -> Iterator[bytes]:
    if isinstance(source, bytes):
        yield source
        return
    with source.open("rb") as file:
        while chunk := file.read(size):
            yield chunk


def in_time(chunks: Iterator[bytes], seconds: float) -> Iterator[bytes]:
    """`chunks`, as long as they come within the time; StoreError after it."""
    end = time.monotonic() + seconds
    for chunk in chunks:
        if time.monotonic() > end:
            raise StoreError(f"A transfer took longer than {seconds:.0f} s; it was given up.")
        yield chunk
