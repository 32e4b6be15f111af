"""The ledger of an API process beside its Valkey, which may be away, and a disk, which may be full."""

import errno
from collections.abc import Callable
from pathlib import Path

import pytest
from redis.asyncio import Redis

from adapters_store.valkey import connect, text
from server.usage.counts import Counts
from server.usage.journal import Journal, write_journal
from server.usage.ledger import Ledger, Tokens
from server.usage.record import COMPLETED, Amounts
from tests.server.usage.records import record

pytestmark = pytest.mark.anyio
Reports = list[tuple[float, int, int]]


@pytest.fixture
def reports() -> Reports:
    return []


@pytest.fixture
def ledger(redis: Redis, tmp_path: Path, reports: Reports) -> Ledger:
    return a_ledger(redis, tmp_path, reports)


def a_ledger(redis: Redis, folder: Path, reports: Reports) -> Ledger:
    return Ledger(Counts(redis), folder / "usage", 400, lambda *report: reports.append(report))


def tokens(prompt: int, cached: int = 0, generated: int = 0) -> Callable[[], Tokens]:
    return lambda: Tokens(prompt, cached, generated)


async def total(redis: Redis) -> Amounts:
    """Of all days and tenants."""
    amounts = Amounts()
    for key in await redis.keys("pp:usage:*:t"):
        day = int(text(key).split(":")[2])
        for [sums] in [await Counts(redis).read(day, ["t"])]:
            for some in sums.values():
                amounts = amounts.plus(some)
    return amounts


def files(folder: Path) -> int:
    return len([*(folder / "usage").glob("*")])


async def test_a_request_is_on_the_disk_before_valkey_hears_of_it(
    ledger: Ledger, redis: Redis, tmp_path: Path
) -> None:
    entry = ledger.begin("r", "t", "key_1", "poet@1", tokens(3, 1, 2))
    entry.end(COMPLETED)
    assert (await total(redis)).requests == 0
    [path] = (tmp_path / "usage").iterdir()
    assert b'"outcome":"completed"' in path.read_bytes()
    await ledger.flush()
    entry.end("engine_lost")  # too late
    await ledger.flush()
    amounts = await total(redis)
    assert amounts[:6] == Amounts(1, 0, 0, 3, 1, 2)[:6]
    await ledger.close()
    assert files(tmp_path) == 0


async def test_what_valkey_does_not_take_is_kept_and_counted_later(
    redis: Redis, tmp_path: Path, reports: Reports
) -> None:
    away = connect(f"unix://{tmp_path}/nobody.sock")
    ledger = a_ledger(away, tmp_path, reports)
    ledger.begin("r", "t", "key_1", "", tokens(3)).end(COMPLETED)
    await ledger.flush()
    await ledger._note()
    lag, pending, _ = reports[-1]
    assert (lag > 0, pending) == (True, 1)
    await ledger.close()
    assert files(tmp_path) == 1
    after = a_ledger(redis, tmp_path, reports)
    await after._take_leftovers()
    assert (await total(redis)).prompt_tokens == 3
    assert files(tmp_path) == 0
    await away.aclose()


async def test_a_request_of_a_killed_process_is_cut_where_it_was_last_noted(
    ledger: Ledger, redis: Redis, tmp_path: Path, reports: Reports
) -> None:
    now = [1]
    ledger.begin("runs", "t", "key_1", "", lambda: Tokens(3, 0, now[0]))
    ledger.begin("ends", "t", "key_1", "", tokens(1)).end(COMPLETED)
    now[0] = 9
    await ledger._note()
    await ledger.flush()  # what ended is in the sums, and the journal has it still
    now[0] = 12
    ledger._journal.close(remove=False)  # the lock is gone, as with the process
    for _ in range(2):
        await a_ledger(redis, tmp_path, reports)._take_leftovers()
    amounts = await total(redis)
    assert (amounts.requests, amounts.cancelled_requests) == (2, 1)
    assert (amounts.prompt_tokens, amounts.generated_tokens) == (4, 9)


async def test_a_journal_that_was_counted_and_not_removed_counts_once(
    ledger: Ledger, redis: Redis, tmp_path: Path
) -> None:
    """A process is killed between the last call of Valkey and the end of the file."""
    write_journal(tmp_path / "usage", [record(1), record(2)])
    [path] = (tmp_path / "usage").iterdir()
    await ledger.counts.add(path.stem, [record(1), record(2)], 1)
    await ledger._take_leftovers()
    assert (await total(redis)).requests == 2
    assert not path.exists()


async def test_a_full_disk_keeps_records_in_memory(
    ledger: Ledger,
    redis: Redis,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "append", full)
        patch.setattr(Journal, "replace", full)
        runs = ledger.begin("runs", "t", "key_1", "", tokens(5))
        for number in range(3):
            ledger.begin(f"r{number}", "t", "key_1", "", tokens(1)).end(COMPLETED)
        await ledger._note()
    assert caplog.text.count("kept in memory: No space left on device") == 1
    await ledger._note()  # there is room again: the journal has all
    [path] = (tmp_path / "usage").iterdir()
    assert path.read_bytes().count(b"\n") == 4
    runs.end(COMPLETED)
    await ledger.flush()
    assert (await total(redis)).prompt_tokens == 8
    await ledger.close()


async def test_a_long_journal_is_written_anew(
    ledger: Ledger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.usage.ledger.COMPACT_BYTES", 1000)
    runs = ledger.begin("runs", "t", "key_1", "", tokens(5))
    for number in range(20):
        ledger.begin(f"r{number}", "t", "key_1", "", tokens(1)).end(COMPLETED)
    await ledger.flush()
    await ledger._note()
    [path] = (tmp_path / "usage").iterdir()
    assert path.read_bytes().count(b"\n") == 1  # what runs
    runs.end(COMPLETED)
    await ledger.close()
    assert files(tmp_path) == 0


async def test_records_beyond_the_bound_are_told(
    tmp_path: Path, reports: Reports, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.usage.ledger.MAX_PENDING", 3)
    away = connect(f"unix://{tmp_path}/nobody.sock")
    ledger = a_ledger(away, tmp_path, reports)
    for number in range(5):
        ledger.begin(f"r{number}", "t", "key_1", "", tokens(1)).end(COMPLETED)
    await ledger._note()
    assert reports[-1][1:] == (3, 2)
    await ledger._note()
    assert reports[-1][1:] == (3, 0)
    await away.aclose()
