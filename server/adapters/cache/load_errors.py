"""Unexpected errors on an adapter's way to its slot: they end the rows that name it, and no others."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from server.errors import PolypeftError, StoreError

log = logging.getLogger(__name__)


@contextmanager
def adapter_errors(undo: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Log any error of the block, call `undo`, and raise a PolypeftError, which ends the adapter's rows."""
    try:
        yield
    except Exception as error:
        log.exception("An adapter could not be brought onto the device")
        undo()
        raise PolypeftError("The adapter could not be brought onto the device; the log says why.") from error


def load_error(error: BaseException) -> PolypeftError:
    """The error for the rows that wait for a failed load: its own if expected, else a logged StoreError."""
    if isinstance(error, PolypeftError):
        return error
    log.error("An adapter could not be loaded", exc_info=error)
    return StoreError("The adapter could not be loaded.")
