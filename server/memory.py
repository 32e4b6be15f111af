"""The machine's memory, and what this process takes of it."""

import gc
import os
import resource
import sys
from contextlib import suppress
from pathlib import Path

_STATM = Path("/proc/self/statm")
_UNIT = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss


def resident_bytes() -> int:
    """Resident now; where the system does not say, the most it ever was."""
    if _STATM.exists():
        return int(_STATM.read_text().split()[1]) * resource.getpagesize()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _UNIT


def machine_bytes() -> int:
    """The machine's memory, or less where a container has less."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with suppress(OSError, ValueError):  # no cgroup, or "max"
        total = min(total, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return total


def settle() -> None:
    """What is there now stays for good: Python's collector looks through it once more, and never again.

    Torch and transformers make half a million objects. To look through them takes 0.2 s, in which no thread
    of the process gets on, and comes at a moment that the next few thousand objects decide: a load's, say.
    """
    gc.collect()
    gc.freeze()
