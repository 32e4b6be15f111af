"""Calls that outlive a restart of the server."""

import time
from collections.abc import Callable
from typing import TypeVar

import httpx

from server.errors import Unavailable

PATIENCE_SECONDS = 600.0  # a large model loads for minutes
RETRY_SECONDS = 2.0
AWAY = (httpx.TransportError, Unavailable)  # what a server that will be back answers, or its absence

T = TypeVar("T")


def retry_while_away(call: Callable[[], T], away: Callable[[Exception], None]) -> T:
    """What `call` returns; it is made again while the server is away, of which `away` hears once.

    Raises what `call` raises: after PATIENCE_SECONDS also that the server is away.
    """
    until, told = time.monotonic() + PATIENCE_SECONDS, False
    while True:
        try:
            return call()
        except AWAY as error:
            if time.monotonic() > until:
                raise
            if not told:
                away(error)
            told = True
        time.sleep(RETRY_SECONDS)
