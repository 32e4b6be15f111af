"""Unexpected errors end the row, the dry run or the command that they occurred in, and nothing else."""

import logging

import torch

from server.errors import PolypeftError

log = logging.getLogger(__name__)


def as_polypeft_error(error: BaseException, what: str) -> PolypeftError:
    """The error to report to the caller for `error`, which ended `what`; a PolypeftError is its own report.

    Any other one is a bug of ours: it is logged with its traceback, and the caller only learns that there was
    one.
    """
    if isinstance(error, PolypeftError):
        return error
    log.error("A fault of the engine's own ended %s", what, exc_info=error)
    return PolypeftError(f"The server failed at {what}, by a fault of its own; its log says more.")


def raise_if_device_lost(error: Exception, device: torch.device) -> None:
    """Raise an error that makes the GPU unusable to this process: after most CUDA errors all calls fail.

    It ends the process; the next one can use the device again.
    """
    if device.type != "cuda":
        return
    if isinstance(error, torch.AcceleratorError):
        raise error
    torch.cuda.synchronize(device)  # raises such an error if it has not been reported yet
