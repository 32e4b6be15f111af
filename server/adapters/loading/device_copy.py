"""Copies of adapters from host RAM to the device, concurrent with its compute.

On a CPU there is nothing to copy: the bank uses the host buffer. On CUDA the copy runs from page-locked
memory on its own stream; before the first step that uses the adapter, the engine's stream waits for the
copy's event. Used on the engine's thread only.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from server.adapters.methods.interface import Packed

cuda: Any = torch.cuda  # typed in part only


@dataclass(frozen=True)
class Copy:
    """`packed` is on the device, and valid once `arrived()`, called on the engine's thread, is true."""

    packed: Any
    arrived: Callable[[], bool]
    source: Any = None  # the host buffer, kept alive while the copy reads it


class DeviceCopier:
    """Copies to one device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = cuda.Stream(device) if device.type == "cuda" else None

    def start(self, packed: Packed) -> Copy:
        """Start the copy; returns at once."""
        if self._stream is None:
            return Copy(packed, lambda: True)
        with cuda.stream(self._stream):
            flat = packed.flat.to(self.device, non_blocking=True)
            event = cuda.Event()
            event.record(self._stream)

        def arrived() -> bool:
            if not event.query():
                return False
            compute = cuda.current_stream(self.device)
            compute.wait_event(event)
            flat.record_stream(compute)  # the allocator must not reuse it while this stream reads it
            return True

        return Copy(replace(packed, flat=flat), arrived, packed)
