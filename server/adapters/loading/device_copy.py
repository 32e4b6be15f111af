"""From host RAM onto the device, beside what runs there.

On a CPU there is nothing to copy: the host buffer is the device's. On CUDA the copy runs from pinned memory
on a stream of its own; the engine's stream waits for its event before the first step that uses it, and the
adapter counts as on its way until then. Used on the engine's thread alone.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from server.adapters.methods.interface import Packed

cuda: Any = torch.cuda  # typed in part only


@dataclass(frozen=True)
class Copy:
    """`packed` is the device's, and may be read once `arrived()`, asked on the engine's thread, said so."""

    packed: Any
    arrived: Callable[[], bool]
    source: Any = None  # must outlive the copy, which reads it


class DeviceCopier:
    """For one device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = cuda.Stream(device) if device.type == "cuda" else None

    def start(self, packed: Packed) -> Copy:
        if self._stream is None:
            return Copy(packed, lambda: True)
        with cuda.stream(self._stream):
            flat = packed.flat.to(self.device, non_blocking=True)
            event = cuda.Event()
            event.record(self._stream)

        def arrived() -> bool:
            if not event.query():
                return False
            own = cuda.current_stream(self.device)
            own.wait_event(event)
            flat.record_stream(own)  # the allocator must not hand it out again while this stream reads it
            return True

        return Copy(replace(packed, flat=flat), arrived, packed)
