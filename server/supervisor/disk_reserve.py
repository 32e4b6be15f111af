"""Disk blocks reserved for the embedded Valkey, so that it outlives a full disk.

Valkey syncs each write before it answers, and exits when a write to its append-only file fails. So blocks are
reserved behind the end of that file, where only Valkey can use them. On a full disk the reserve takes its
small writes, deletions among them. Before the reserve is used up, Valkey is configured to refuse writes,
while reads, and so inference, go on; once there is space again it is configured to take writes.
"""

import asyncio
import ctypes
import errno
import logging
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Literal

from redis.asyncio import Redis
from redis.exceptions import RedisError

RESERVED_BYTES = 16 << 20
REFILL_BELOW_BYTES = 12 << 20  # a smaller reserve is filled up again
REFUSE_BELOW_BYTES = 4 << 20  # with a smaller reserve writes are refused: more than one POLL_SECONDS writes
POLL_SECONDS = 0.2
BLOCK_BYTES = 512  # the unit of st_blocks on every file system
FALLOC_FL_KEEP_SIZE = 1  # fallocate reserves blocks and leaves the file's length
# With 1, Valkey refuses clients' writes, because it has no replica; there is no plainer option.
REFUSE_WRITES = "min-replicas-to-write"
AUTO_REWRITE = (
    "auto-aof-rewrite-percentage"  # a rewrite begins a new file, which has no reserve on a full disk
)
State = Literal["whole", "shrinking", "used up"]
STATE_TEXTS: dict[State, str] = {
    "whole": "there is room again, and Valkey takes all writes",
    "shrinking": "it is full; Valkey takes writes as long as its reserve lasts",
    "used up": "it is full, and Valkey refuses all writes until there is room",
}
AOF_NAME = re.compile(r"appendonly\.aof\.(\d+)\.incr\.aof")
log = logging.getLogger(__name__)


class DiskReserve:
    def __init__(self, folder: Path) -> None:
        """`folder` is Valkey's data directory."""
        self._folder = folder

    def refill(self) -> State:
        """Fill the reserve up if it is low and the disk has space; its state. Raises nothing."""
        try:
            with self._file().open("r+b", buffering=0) as file:
                if _reserved(file.fileno()) >= REFILL_BELOW_BYTES or _reserve(file.fileno()):
                    return "whole"
                reserved = _reserved(file.fileno())
        except NotImplementedError:  # the file system cannot reserve: take the free space, which all share
            reserved = shutil.disk_usage(self._folder).free
        except FileNotFoundError:  # Valkey is about to create it, or has just begun a new one
            return "whole"
        except OSError:  # the disk is broken or read-only
            return "used up"
        if reserved >= REFILL_BELOW_BYTES:
            return "whole"
        return "shrinking" if reserved >= REFUSE_BELOW_BYTES else "used up"

    def _file(self) -> Path:
        """The file that Valkey appends to: that of the highest number. Raises FileNotFoundError."""
        numbers = {
            int(found[1]): path
            for path in (self._folder / "appendonlydir").iterdir()
            if (found := AOF_NAME.fullmatch(path.name))
        }
        if not numbers:
            raise FileNotFoundError
        return numbers[max(numbers)]


async def keep_reserve(client: Redis, reserve: DiskReserve) -> None:
    """Until cancelled: refill the reserve, and configure Valkey by its state."""
    configured: State = "whole"
    while True:
        state = await asyncio.to_thread(reserve.refill)
        if not state == configured == "whole":  # each time: a restarted Valkey has lost its configuration
            try:
                await client.config_set(
                    REFUSE_WRITES, int(state == "used up"), AUTO_REWRITE, 100 * (state == "whole")
                )
            except (RedisError, OSError):
                log.debug("Valkey does not answer and is told later what its disk allows")
            else:
                if state != configured:
                    log.warning("The disk of the data directory: %s", STATE_TEXTS[state])
                configured = state
        await asyncio.sleep(POLL_SECONDS)


def _reserved(descriptor: int) -> int:
    """Bytes that are allocated to the file beyond its end."""
    status = os.fstat(descriptor)
    return status.st_blocks * BLOCK_BYTES - status.st_size


def _reserve(descriptor: int) -> bool:
    """False if the disk lacks the space. Raises NotImplementedError where blocks cannot be reserved."""
    if sys.platform != "linux":
        raise NotImplementedError
    fallocate = ctypes.CDLL(None, use_errno=True).fallocate
    fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    end = os.fstat(descriptor).st_size
    if fallocate(descriptor, FALLOC_FL_KEEP_SIZE, end, RESERVED_BYTES) == 0:
        return True
    if ctypes.get_errno() in (errno.EOPNOTSUPP, errno.ENOSYS):
        raise NotImplementedError
    return False
