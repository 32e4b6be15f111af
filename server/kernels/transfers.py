"""Asynchronous copies between host and device."""

from collections.abc import Sequence
from itertools import chain

import torch


def send(values: Sequence[float], device: torch.device, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    """The values as a tensor [len(values)] on the device, by an asynchronous copy from page-locked memory."""
    page_locked = torch.tensor(values, dtype=dtype, pin_memory=device.type == "cuda")
    return page_locked.to(device, non_blocking=True)


def upload(parts: Sequence[Sequence[int]], device: torch.device) -> list[torch.Tensor]:
    """Each part as an int64 tensor [len(part)] on the device, in one asynchronous copy."""
    flat = send([*chain.from_iterable(parts)], device)
    return list(torch.split(flat, [len(part) for part in parts]))


class Download:
    """An asynchronous copy of tensors to the host, begun when it is made."""

    def __init__(self, parts: Sequence[torch.Tensor]) -> None:
        self._parts, self._event = list(parts), None
        if parts[0].is_cuda:
            hosts = [torch.empty(part.shape, dtype=part.dtype, pin_memory=True) for part in parts]
            self._parts = [to.copy_(part, non_blocking=True) for to, part in zip(hosts, parts, strict=True)]
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record()

    def wait(self) -> list[torch.Tensor]:
        """The tensors on the host, once the copy has ended."""
        if self._event:
            self._event.synchronize()
        return self._parts
