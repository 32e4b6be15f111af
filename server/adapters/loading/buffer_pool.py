"""Host buffers in which files are read, checked and packed, reused from load to load.

Fresh memory costs a page fault for every 4 KiB, more than reading the file into it; and when a C library
returns freed memory to the system depends on the order of frees. So a few buffers are kept.
"""

from threading import Lock

import torch

MAX_POOLED_BUFFERS = 2  # however much is reserved for loads in the RAM tier
MAX_POOLED_BYTES = 32 << 20  # of one buffer; larger ones are freed


class BufferPool:
    """Used on any thread."""

    def __init__(self) -> None:
        self._free: list[torch.Tensor] = []
        self._lock = Lock()

    def take(self, nbytes: int) -> torch.Tensor:
        """A buffer with arbitrary content, uint8 [nbytes or more]; the caller gives it back, or drops it."""
        with self._lock:
            for i, buffer in enumerate(self._free):
                if len(buffer) >= nbytes:
                    return self._free.pop(i)
            if self._free and nbytes <= MAX_POOLED_BYTES:
                self._free.pop()  # the new buffer will take its place in the pool
        return torch.empty(nbytes, dtype=torch.uint8)

    def give_back(self, buffer: torch.Tensor) -> None:
        """Return a buffer that nothing reads or writes any more."""
        with self._lock:
            if len(buffer) <= MAX_POOLED_BYTES and len(self._free) < MAX_POOLED_BUFFERS:
                self._free.append(buffer)
