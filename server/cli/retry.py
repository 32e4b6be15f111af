"""Retries calls while the server restarts."""

import time
from collections.abc import Callable
from typing import TypeVar

import httpx

from server.errors import Unavailable

RETRY_FOR_SECONDS = 600.0  # a large model loads for minutes
RETRY_INTERVAL_SECONDS = 2.0
SERVER_AWAY = (httpx.TransportError, Unavailable)  # errors that a restart of the server explains

T = TypeVar("T")


def retry_while_away(call: Callable[[], T], on_away: Callable[[Exception], None]) -> T:
    """The result of `call`, made again while it raises SERVER_AWAY; `on_away` is called at the first time.

    Raises the errors of `call`; SERVER_AWAY after RETRY_FOR_SECONDS only.
    """
    until, reported = time.monotonic() + RETRY_FOR_SECONDS, False
    while True:
        try:
            return call()
        except SERVER_AWAY as error:
            if time.monotonic() > until:
                raise
            if not reported:
                on_away(error)
            reported = True
        time.sleep(RETRY_INTERVAL_SECONDS)
