"""Errors that nobody foresaw, on an adapter's way to its slot: the rows' that name it, and nobody else's."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from server.errors import PolypeftError, StoreError

log = logging.getLogger(__name__)


@contextmanager
def adapter_errors(undo: Callable[[], None] = lambda: None) -> Iterator[None]:
    """An error of this block ends the rows that name the adapter: `undo`, and raise it as one of theirs."""
    try:
        yield
    except Exception as error:
        log.exception("An adapter could not be brought onto the device")
        undo()
        raise PolypeftError("The adapter could not be brought onto the device; the log says why.") from error


def load_error(error: BaseException) -> PolypeftError:
    """What those who wait for a load are told of its end; what nobody foresaw is in the log as well."""
    if isinstance(error, PolypeftError):
        return error
    log.error("An adapter could not be loaded", exc_info=error)
    return StoreError("The adapter could not be loaded.")
