"""Waiting for what another process or thread brings about."""

import asyncio
import time
from collections.abc import Callable
from typing import Any

PATIENCE = 120.0  # seconds: only what hangs takes as long, whatever else the machine does meanwhile


def until(condition: Callable[[], Any], explain: Callable[[], str] = str, seconds: float = PATIENCE) -> None:
    """Returns once the condition holds. A smaller bound is itself what a test asserts."""
    start = time.monotonic()
    while not condition():
        time.sleep(_pause(start, explain, seconds))


async def eventually(condition: Callable[[], Any], seconds: float = PATIENCE) -> None:
    """`until` for a condition that this event loop brings about."""
    start = time.monotonic()
    while not condition():  # noqa: ASYNC110 - it is another process's doing
        await asyncio.sleep(_pause(start, str, seconds))


def _pause(start: float, explain: Callable[[], str], seconds: float) -> float:
    """Longer and longer: whoever asks takes time from what is waited for."""
    waited = time.monotonic() - start
    assert waited < seconds, explain() or f"not within {seconds} s"
    return min(max(waited / 20, 0.005), 0.25)
