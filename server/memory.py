"""The machine's memory, and this process's part of it."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

_THIS_PROCESS = psutil.Process()


def resident_bytes() -> int:
    return int(_THIS_PROCESS.memory_info().rss)


def machine_bytes() -> int:
    """The machine's memory, or the container's limit if that is less."""
    total = int(psutil.virtual_memory().total)
    with suppress(OSError, ValueError):  # no cgroup, or "max"
        total = min(total, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return total


@contextmanager
def paused_garbage_collector() -> Iterator[None]:
    """No collections in the block, which builds what a process keeps; none over those objects later.

    Torch and transformers create half a million objects. A collection over them takes 0.2 s, in which no
    thread of the process runs, and begins at a random moment, such as an adapter's load. Those that run
    while the objects are made find nothing to free.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.collect()
        gc.freeze()
        gc.enable()
