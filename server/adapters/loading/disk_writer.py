"""The end of a load: its file is copied to the disk tier, and its memory is given back.

No row waits for a disk copy, and writing one would slow the rows that run. So copies are made one at a time,
on a thread of the scheduling class SCHED_IDLE, which runs when the machine has nothing else to do.
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

MAX_QUEUED_COPIES = 4  # each keeps its file in RAM; loads beyond these leave no copy on disk
log = logging.getLogger(__name__)


class LoadedFile(NamedTuple):
    """A file that was loaded, and the adapter packed from it."""

    digest: str
    tenant: str
    packed: Packed
    blob: Blob
    buffer: torch.Tensor  # of the pool, uint8; its first `blob.bytes` are the file


class DiskWriter:
    """Ends loads: copies the file to disk, gives the buffer back, reduces the load's reservation in the RAM
    tier to the adapter itself, and releases its claim.
    """

    def __init__(self, disk: DiskTier, ram: RamTier[Packed], buffers: BufferPool) -> None:
        self.disk = disk
        self.ram = ram
        self.buffers = buffers
        self._queued = threading.BoundedSemaphore(MAX_QUEUED_COPIES)
        self._freeing: Future[None] | None = None
        self._thread = ThreadPoolExecutor(1, "adapter-disk-writer", initializer=_run_when_idle)

    def end(self, file: LoadedFile, *, copy: bool) -> None:
        """End a load. `copy`: also keep the file on disk, if the tier admits it."""
        if copy and self._queued.acquire(blocking=False):
            with contextlib.suppress(RuntimeError):  # closed: the engine is stopping
                self._thread.submit(self._copy, file)
        else:
            self._release(file)

    def free_disk_space(self) -> None:
        """Start removing copies if the disk is nearly full of other files. To be called regularly."""
        if self._freeing is None or self._freeing.done():
            with contextlib.suppress(RuntimeError):  # closed
                self._freeing = self._thread.submit(self.disk.free_disk_space)

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _copy(self, file: LoadedFile) -> None:
        try:
            data = memoryview(file.buffer.numpy())[: file.blob.bytes]  # type: ignore[arg-type]
            self.disk.write(file.blob.sha256, file.tenant, data)
        except Exception:
            log.exception("After an adapter was loaded")
        finally:
            self._queued.release()
            self._release(file)

    def _release(self, file: LoadedFile) -> None:
        self.buffers.give_back(file.buffer)
        self.ram.trim(file.digest, file.packed)
        self.ram.release(file.digest)


def _run_when_idle() -> None:
    """Give this thread the idle scheduling class, where the system has it and allows it."""
    with contextlib.suppress(OSError, AttributeError):
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
