"""Valkey's outages: whether it answers, and its last answers, for callers that can do without it a while.

The trade-off: while Valkey is away, what it said lately holds, for a bounded time. While it is there, it is
asked every time.
"""

import asyncio
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

from server.errors import PolypeftError, StoreError

Answer = TypeVar("Answer")
ANSWER_SECONDS = 1.0  # for callers that can do without; others wait longer (valkey.py)
PROBE_SECONDS = 1.0
MAX_ANSWERS = 10_000


class Outage:
    """Whether Valkey answers. One a process: what one caller finds out spares the others the wait."""

    def __init__(self, answer_seconds: float = ANSWER_SECONDS) -> None:
        self._answer_seconds = answer_seconds
        self._away = False
        self._ask_again = 0.0  # time.monotonic()

    async def ask(self, call: Callable[[], Awaitable[Answer]]) -> Answer:
        """Valkey's answer. Raises StoreError if it does not come in time, and at once while Valkey is known
        to be away; every PROBE_SECONDS one caller finds out. It may have done what was asked all the same.
        """
        if self._away:
            now = time.monotonic()
            if now < self._ask_again:
                raise StoreError("The control store is away; try again.")
            self._ask_again = now + self._answer_seconds + PROBE_SECONDS
        try:
            async with asyncio.timeout(self._answer_seconds):
                answer = await call()
        except (StoreError, TimeoutError) as error:
            self._away, self._ask_again = True, time.monotonic() + PROBE_SECONDS
            raise StoreError("The control store did not answer; try again.") from error
        self._away = False
        return answer


class LastAnswers(Generic[Answer]):
    """What Valkey answered last to each question, for `seconds`; the MAX_ANSWERS that were asked last."""

    def __init__(self, outage: Outage | None = None, seconds: float = 0.0) -> None:
        self._outage = outage or Outage()
        self._seconds = seconds
        self._answers: OrderedDict[object, tuple[float, Answer]] = OrderedDict()  # oldest first

    async def ask(self, question: object, call: Callable[[], Awaitable[Answer]]) -> Answer:
        """Valkey's answer; the last one, if that is known and Valkey is away. Raises StoreError."""
        last = self._answers.get(question)
        if last is None or time.monotonic() - last[0] > self._seconds:
            answer = await call()
        else:
            try:
                answer = await self._outage.ask(call)
            except StoreError:
                return last[1]
            except PolypeftError:  # an answer as well
                self._answers.pop(question, None)
                raise
        self._remember(question, answer)
        return answer

    def _remember(self, question: object, answer: Answer) -> None:
        self._answers.pop(question, None)
        if answer and self._seconds:
            self._answers[question] = time.monotonic(), answer
            if len(self._answers) > MAX_ANSWERS:
                self._answers.popitem(last=False)
