"""Low priority and resource limits for a training process, so that it does not disturb the server beside it.

The process calls these functions once, before it loads anything.
"""

import logging
import os
import resource
import sys
from contextlib import suppress
from pathlib import Path

NICE = 19
OOM_SCORE = 800  # of 1000: when memory runs out, the kernel takes this process, not the engine
log = logging.getLogger(__name__)


def yield_to_others() -> None:
    """Give this process the lowest priority. Calls that the platform lacks or forbids are skipped."""
    with suppress(OSError):
        os.nice(NICE)
    if sys.platform == "linux":
        with suppress(OSError):
            os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
        with suppress(OSError):
            Path("/proc/self/oom_score_adj").write_text(str(OOM_SCORE))


def limit_resources(file_bytes: int, memory_bytes: int | None) -> None:
    """Limit the size of a file and the private memory of this process; no core dumps.

    `memory_bytes` is None on a GPU: CUDA reserves address space that it does not use.
    """
    _limit(resource.RLIMIT_CORE, 0)  # a core dump would contain a tenant's text
    _limit(resource.RLIMIT_FSIZE, file_bytes)
    if memory_bytes is not None and sys.platform == "linux":
        _limit(resource.RLIMIT_DATA, memory_bytes)  # the base's mapped weights do not count


def oom_kills() -> int:
    """How many processes this machine's kernel has killed for lack of memory; 0 where it does not count."""
    with suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/vmstat").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("oom_kill ")).split()[1])
    return 0


def _limit(which: int, value: int) -> None:
    _, hard = resource.getrlimit(which)
    limit = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(which, (limit, limit))
