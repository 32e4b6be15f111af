"""Calls that are made again until the stores answer."""

import pytest

from server.errors import NotFound, PolypeftError, StoreError
from server.finetune.worker import retry as patience
from server.finetune.worker.retry import retry_on_outage

pytestmark = pytest.mark.anyio


@pytest.fixture(autouse=True)
def _brisk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "FIRST_DELAY_SECONDS", 0.001)


class Flaky:
    def __init__(self, failures: int, error: PolypeftError) -> None:
        self.calls = 0
        self._failures = failures
        self._error = error

    async def __call__(self) -> int:
        self.calls += 1
        if self.calls <= self._failures:
            raise self._error
        return self.calls


async def test_it_outlasts_an_outage() -> None:
    assert await retry_on_outage(Flaky(5, StoreError("Away.")), 10) == 6


async def test_it_does_not_wait_for_ever() -> None:
    with pytest.raises(StoreError, match="Away"):
        await retry_on_outage(Flaky(1000, StoreError("Away.")), 0.05)


async def test_it_gives_up_when_told() -> None:
    call = Flaky(1000, StoreError("Away."))
    with pytest.raises(StoreError):
        await retry_on_outage(call, 60, lambda: call.calls == 3)
    assert call.calls == 3


async def test_an_answer_is_an_answer() -> None:
    call = Flaky(1, NotFound("No such thing."))
    with pytest.raises(NotFound):
        await retry_on_outage(call, 60)
    assert call.calls == 1
