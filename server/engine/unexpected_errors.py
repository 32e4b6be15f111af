"""What an error that nobody foresaw ends: the row, the trial or the command that it came with."""

import logging

import torch

from server.errors import PolypeftError

log = logging.getLogger(__name__)


def as_polypeft_error(error: BaseException, what: str) -> PolypeftError:
    """What a caller hears of `error`, which ended `what`: its own words if it was raised for a caller.

    Any other is a bug of ours: the log has it whole, the caller that there was one.
    """
    if isinstance(error, PolypeftError):
        return error
    log.error("A fault of the engine's own ended %s", what, exc_info=error)
    return PolypeftError(f"The server failed at {what}, by a fault of its own; its log says more.")


def raise_if_device_lost(error: Exception, device: torch.device) -> None:
    """Raise what leaves a GPU of no use to this process: after most of CUDA's errors every later call fails.

    The process ends by it, and the next one has a device again.
    """
    if device.type != "cuda":
        return
    if isinstance(error, torch.AcceleratorError):
        raise error
    torch.cuda.synchronize(device)  # raises such an error that has not been heard of yet
