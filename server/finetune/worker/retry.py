"""Retries over an outage of Valkey or the object store, for results that took long to compute."""

import asyncio
import logging
import random
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

from server.errors import StoreError

FIRST_DELAY_SECONDS = 0.2
MAX_DELAY_SECONDS = 5.0

T = TypeVar("T")
log = logging.getLogger(__name__)


async def retry_on_outage(
    call: Callable[[], Awaitable[T]], seconds: float, give_up: Callable[[], bool] = lambda: False
) -> T:
    """Repeat `call`, with growing delays, while it raises StoreError; its result. `call` must be idempotent.

    Raises the last StoreError after `seconds`, or as soon as `give_up()` is true.
    """
    deadline, delay = time.monotonic() + seconds, FIRST_DELAY_SECONDS
    while True:
        try:
            return await call()
        except StoreError as error:
            if give_up() or time.monotonic() + delay > deadline:
                raise
            log.warning("%s Again in %.1f s", error.message, delay)
        await asyncio.sleep(delay)
        delay = min(2 * delay, MAX_DELAY_SECONDS) * random.uniform(0.8, 1.0)  # noqa: S311 - jitter
