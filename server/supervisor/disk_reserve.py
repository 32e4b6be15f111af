"""Room on the disk for what the embedded Valkey is still to write, kept while others fill the disk.

Valkey, told to have each write on the disk before it answers, exits at the first that fails. So blocks are
reserved behind the end of its append-only file, where only it can use them. While the disk is full the
reserve takes its small writes, deletions among them. Before it is used up Valkey is told to refuse all
writes, while reads, so inference, go on; once there is room again it is told to take them.
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
TOPPED_UP_BYTES = 12 << 20  # with less ahead of the file's end than this, the reserve is filled again
REFUSED_BYTES = 4 << 20  # with less than this, no write is taken: more than comes between two looks
LOOK_SECONDS = 0.2
BLOCK_BYTES = 512  # st_blocks' unit, whatever the file system's own
KEEP_SIZE = 1  # fallocate's flag: reserve, and leave the file as long as it is
# A client's write is refused for want of a replica, which Valkey has none of; it has no plainer switch.
SWITCH = "min-replicas-to-write"
REWRITE = "auto-aof-rewrite-percentage"  # a rewrite begins a new file, which on a full disk has no reserve
State = Literal["whole", "shrinking", "used up"]
WORDS: dict[State, str] = {
    "whole": "there is room again, and Valkey takes all writes",
    "shrinking": "it is full; Valkey takes writes as long as its reserve lasts",
    "used up": "it is full, and Valkey refuses all writes until there is room",
}
FILE = re.compile(r"appendonly\.aof\.(\d+)\.incr\.aof")
log = logging.getLogger(__name__)


class DiskReserve:
    def __init__(self, folder: Path) -> None:
        """`folder` is Valkey's own."""
        self._folder = folder

    def hold(self) -> State:
        """Fill the reserve if the disk has room. Raises nothing."""
        try:
            with self._file().open("r+b", buffering=0) as file:
                if _ahead(file.fileno()) >= TOPPED_UP_BYTES or _reserve(file.fileno()):
                    return "whole"
                ahead = _ahead(file.fileno())
        except NotImplementedError:  # the file system cannot reserve: look at what everybody shares
            ahead = shutil.disk_usage(self._folder).free
        except FileNotFoundError:  # Valkey is about to make it, or has just made a new one
            return "whole"
        except OSError:  # the disk is broken or read-only
            return "used up"
        if ahead >= TOPPED_UP_BYTES:
            return "whole"
        return "shrinking" if ahead >= REFUSED_BYTES else "used up"

    def _file(self) -> Path:
        """What Valkey appends to: the file of the highest number."""
        numbers = {
            int(found[1]): path
            for path in (self._folder / "appendonlydir").iterdir()
            if (found := FILE.fullmatch(path.name))
        }
        if not numbers:
            raise FileNotFoundError
        return numbers[max(numbers)]


async def keep_reserve(client: Redis, reserve: DiskReserve) -> None:
    """Until cancelled: hold the reserve, and tell Valkey what it allows."""
    told: State = "whole"
    while True:
        state = await asyncio.to_thread(reserve.hold)
        if not state == told == "whole":  # told each time: a Valkey that was restarted does not know
            try:
                await client.config_set(SWITCH, int(state == "used up"), REWRITE, 100 * (state == "whole"))
            except (RedisError, OSError):
                log.debug("Valkey does not answer and is told later what its disk allows")
            else:
                if state != told:
                    log.warning("The disk of the data directory: %s", WORDS[state])
                told = state
        await asyncio.sleep(LOOK_SECONDS)


def _ahead(descriptor: int) -> int:
    """Bytes that the file has on the disk beyond its end."""
    found = os.fstat(descriptor)
    return found.st_blocks * BLOCK_BYTES - found.st_size


def _reserve(descriptor: int) -> bool:
    """False if the disk lacks the room. Raises NotImplementedError where blocks cannot be reserved."""
    if sys.platform != "linux":
        raise NotImplementedError
    call = ctypes.CDLL(None, use_errno=True).fallocate
    call.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    end = os.fstat(descriptor).st_size
    if call(descriptor, KEEP_SIZE, end, RESERVED_BYTES) == 0:
        return True
    if ctypes.get_errno() in (errno.EOPNOTSUPP, errno.ENOSYS):
        raise NotImplementedError
    return False
