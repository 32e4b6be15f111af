"""What a load leaves behind once its adapter is there: a file to copy onto disk, and room to give back.

Nobody waits for a copy, and the rows that run would pay for it. So copies are made one at a time, by a thread
that runs when no other of the machine's would.
"""

import contextlib
import logging
import os
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import torch

from adapters_store.manifest import Blob
from server.adapters.cache.disk_tier import DiskTier
from server.adapters.cache.ram_tier import RamTier
from server.adapters.loading.buffer_pool import BufferPool
from server.adapters.methods.interface import Packed

MAX_WAITING = 4  # copies; beyond that loads make none, for each keeps its file in RAM meanwhile
log = logging.getLogger(__name__)


class LoadedFile(NamedTuple):
    digest: str
    tenant: str
    packed: Packed
    blob: Blob
    sheet: torch.Tensor  # of the desk; its first bytes are the file


class DiskWriter:
    """Ends loads: trims what they have in the RAM tier to the adapter itself, and releases their claim."""

    def __init__(self, disk: DiskTier, ram: RamTier[Packed], desk: BufferPool) -> None:
        self.disk = disk
        self.ram = ram
        self.desk = desk
        self._waiting = threading.BoundedSemaphore(MAX_WAITING)
        self._giving_way: Future[None] | None = None
        self._thread = ThreadPoolExecutor(1, "adapter-keeper", initializer=_stand_back)

    def end(self, arrived: LoadedFile, *, copy: bool) -> None:
        """`copy`: also keep the file on disk, if the tier finds it worth its room."""
        if copy and self._waiting.acquire(blocking=False):
            with contextlib.suppress(RuntimeError):  # closed: the engine is stopping
                self._thread.submit(self._copy, arrived)
        else:
            self._clear_up(arrived)

    def give_way(self) -> None:
        """Let copies on disk make way for what others write there. Nobody waits; call it now and then."""
        if self._giving_way is None or self._giving_way.done():
            with contextlib.suppress(RuntimeError):  # closed
                self._giving_way = self._thread.submit(self.disk.give_way)

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _copy(self, arrived: LoadedFile) -> None:
        try:
            file = memoryview(arrived.sheet.numpy())[: arrived.blob.bytes]  # type: ignore[arg-type]
            self.disk.write(arrived.blob.sha256, arrived.tenant, file)
        except Exception:
            log.exception("After an adapter was loaded")
        finally:
            self._waiting.release()
            self._clear_up(arrived)

    def _clear_up(self, arrived: LoadedFile) -> None:
        self.desk.give_back(arrived.sheet)
        self.ram.trim(arrived.digest, arrived.packed)
        self.ram.release(arrived.digest)


def _stand_back() -> None:
    """What the system lacks or forbids is left out."""
    with contextlib.suppress(OSError, AttributeError):
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
