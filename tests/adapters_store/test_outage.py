"""What Valkey said last, for callers that can do without it: fresh, bounded, never instead of its answer."""

import asyncio
import time

import pytest

from adapters_store import outage
from adapters_store.outage import LastAnswers, Outage
from server.errors import StoreError

pytestmark = pytest.mark.anyio


class Valkey:
    """Counts what it is asked; answers, fails, or does not answer at all."""

    def __init__(self) -> None:
        self.asked = 0
        self.answer: str | None = "a"
        self.fails = self.hangs = False

    async def __call__(self) -> str | None:
        self.asked += 1
        if self.hangs:
            await asyncio.sleep(60)
        if self.fails:
            raise StoreError("away")
        return self.answer


async def test_it_is_asked_every_time_while_it_answers() -> None:
    valkey, last = Valkey(), LastAnswers[str | None](seconds=60)
    assert await last.ask("q", valkey) == "a"
    valkey.answer = "b"
    assert await last.ask("q", valkey) == "b"
    valkey.answer = None  # revoked
    assert await last.ask("q", valkey) is None
    valkey.fails = True
    with pytest.raises(StoreError):
        await last.ask("q", valkey)


async def test_one_caller_finds_out_and_spares_the_others_the_wait() -> None:
    valkey = Valkey()
    last = LastAnswers[str | None](Outage(answer_seconds=0.05), seconds=60)
    assert await last.ask("q", valkey) == "a"
    valkey.hangs = True
    assert [await last.ask("q", valkey) for _ in range(100)] == ["a"] * 100
    assert valkey.asked <= 1 + 1 + 10  # a machine may be busy for seconds
    valkey.hangs, valkey.fails = False, True
    with pytest.raises(StoreError):  # another question waits for its own answer
        await last.ask("other", valkey)


async def test_answers_grow_old_and_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outage, "MAX_ANSWERS", 3)
    valkey, last = Valkey(), LastAnswers[str | None](seconds=60)
    for question in "abcda":
        await last.ask(question, valkey)
    assert list(last._answers) == ["c", "d", "a"]
    last._answers["d"] = time.monotonic() - 61, "old"
    valkey.fails = True
    assert await last.ask("c", valkey) == "a"
    for question in "bd":
        with pytest.raises(StoreError):
            await last.ask(question, valkey)


async def test_without_seconds_nothing_is_kept() -> None:
    valkey, last = Valkey(), LastAnswers[str | None]()
    assert await last.ask("q", valkey) == "a"
    valkey.fails = True
    with pytest.raises(StoreError):
        await last.ask("q", valkey)
