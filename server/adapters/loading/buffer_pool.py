"""Where files are laid out while they are checked and packed: memory that is used again.

Fresh memory costs a page fault for every 4 KiB, more than reading the file into it; and what a C library
gives back to the system, and when, depends on the order of frees. So a few sheets are kept.
"""

from threading import Lock

import torch

MAX_POOLED_BUFFERS = 2  # sheets, whatever is reserved for loads in the RAM tier
MAX_POOLED_BYTES = 32 << 20  # bytes of one that is kept


class BufferPool:
    """Used on any thread."""

    def __init__(self) -> None:
        self._free: list[torch.Tensor] = []
        self._lock = Lock()

    def take(self, nbytes: int) -> torch.Tensor:
        """uint8 [nbytes or more] of anything, the caller's until it gives it back or forgets it."""
        with self._lock:
            for i, sheet in enumerate(self._free):
                if len(sheet) >= nbytes:
                    return self._free.pop(i)
            if self._free and nbytes <= MAX_POOLED_BYTES:
                self._free.pop()  # the new one will take its place
        return torch.empty(nbytes, dtype=torch.uint8)

    def give_back(self, sheet: torch.Tensor) -> None:
        """Nobody looks at it any more."""
        with self._lock:
            if len(sheet) <= MAX_POOLED_BYTES and len(self._free) < MAX_POOLED_BUFFERS:
                self._free.append(sheet)
