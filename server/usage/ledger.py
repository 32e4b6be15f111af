"""The ledger in an API process: requests are noted in its journal, and their records added to the sums.

Beginning and end of a request cost a write to the journal each, and no call of Valkey.
"""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import msgspec

from server.errors import StoreError
from server.usage.counts import Counts
from server.usage.journal import Journal, Leftover, leftovers, remove_partial_files
from server.usage.record import OPEN, SECONDS_A_DAY, Record

FLUSH_SECONDS = 0.25  # between two calls of Valkey
NOTE_SECONDS = 1.0  # between two notes of the state of running requests
LEFTOVER_SECONDS = 2.0  # between two looks for journals that nobody holds
DELETE_SECONDS = 3600.0  # between two looks for days that are too old
CLOSE_SECONDS = 5.0  # for the last call of Valkey
MAX_BATCH = 500  # records in a call
MAX_PENDING = 50_000  # records in memory
COMPACT_BYTES = 4 << 20  # of a journal that is written anew
log = logging.getLogger(__name__)


class Tokens(NamedTuple):
    """Of a request, so far."""

    prompt: int
    cached: int
    generated: int


# seconds since the oldest record that is not in the sums, how many are not, how many were lost since the last
# report
Report = Callable[[float, int, int], None]


class Entry:
    """A request that runs. `end` it once; what comes after that changes nothing."""

    def __init__(self, ledger: "Ledger", record: Record, tokens: Callable[[], Tokens]) -> None:
        self.id = record.id
        self._ledger = ledger
        self._record = record
        self._tokens = tokens
        self._began = time.monotonic()

    def end(self, outcome: str) -> None:
        """The request has ended. When this returns, its record outlives the process."""
        self._ledger.end(self, outcome)

    def state(self, number: int, outcome: str = OPEN) -> Record:
        """The record as of now."""
        tokens = self._tokens()
        return msgspec.structs.replace(
            self._record,
            number=number,
            at=time.time(),
            outcome=outcome,
            prompt_tokens=tokens.prompt,
            cached_tokens=tokens.cached,
            generated_tokens=tokens.generated,
            seconds=round(time.monotonic() - self._began, 3),
        )


class Ledger:
    """One of each API process. `report` gets its state once a second."""

    def __init__(self, counts: Counts, folder: Path, keep_days: int, report: Report) -> None:
        self.counts = counts
        self._folder = folder
        self._keep_days = keep_days
        self._report = report
        self._journal = Journal(folder)
        self._open: dict[str, Entry] = {}
        self._pending: deque[Record] = deque()
        self._number = 0  # of the last record
        self._lost = 0
        self._lag = 0.0  # the longest since the last report
        self._most_pending = 0  # the same
        self._left_since: float | None = None  # of another process's records that could not be added
        self._unwritten = False  # the journal lacks records
        self._flushing = asyncio.Lock()

    def begin(self, id_: str, tenant: str, key: str, adapter: str, tokens: Callable[[], Tokens]) -> Entry:
        """Note a request that begins. `tokens` is called for its state, now and then and at its end."""
        record = Record(
            id=id_, kind="request", number=0, at=time.time(), tenant=tenant, key=key, adapter=adapter
        )
        entry = self._open[id_] = Entry(self, record, tokens)
        self._write([entry.state(self._number)])
        return entry

    def end(self, entry: Entry, outcome: str) -> None:
        if self._open.pop(entry.id, None) is None:
            return
        if len(self._pending) >= MAX_PENDING:
            self._lost += 1
            return
        self._number += 1
        record = entry.state(self._number, outcome)
        self._pending.append(record)
        self._write([record])

    async def run(self, *, delete: bool) -> None:
        """Flush, note, take leftovers and, if told to, delete old days, for ever. Raises nothing."""
        loops = [
            _every(FLUSH_SECONDS, self.flush),
            _every(NOTE_SECONDS, self._note),
            _every(LEFTOVER_SECONDS, self._take_leftovers),
        ]
        await asyncio.gather(*loops, *([_every(DELETE_SECONDS, self._delete_old_days)] if delete else []))

    async def flush(self) -> None:
        """Add all records to the sums; if Valkey does not take them, sync the journal. Raises nothing."""
        self._measure()
        try:
            async with self._flushing:
                await self._add_pending()
        except StoreError as error:
            log.warning("%d records of usage wait for Valkey: %s", len(self._pending), error.message)
            await self._sync()

    async def close(self) -> None:
        """Add what there is, a moment long; what Valkey does not take now is left to the next process."""
        try:
            async with asyncio.timeout(CLOSE_SECONDS):
                await self.flush()
        except TimeoutError:
            log.warning("Valkey does not answer; the next start adds the last records of usage")
        self._journal.close(remove=not self._pending and not self._open)

    async def _add_pending(self) -> None:
        while self._pending:
            batch = list(islice(self._pending, MAX_BATCH))
            await self.counts.add(self._journal.id, batch, _today())
            for _ in batch:
                self._pending.popleft()

    async def _note(self) -> None:
        """Write the state of all running requests; in a new file if this one is long, or lacks records."""
        self._tell()
        states = [entry.state(self._number) for entry in self._open.values()]
        if not self._unwritten and self._journal.bytes < COMPACT_BYTES:
            if states:
                self._write(states)
            return
        try:
            self._journal.replace([*self._pending, *states])
        except OSError as error:
            self._complain(error)
        else:
            self._unwritten = False

    def _write(self, records: list[Record]) -> None:
        try:
            self._journal.append(records)
        except OSError as error:  # they are in memory
            self._complain(error)

    def _complain(self, error: OSError) -> None:
        if not self._unwritten:
            log.error(
                "Usage cannot be written to the disk, and is kept in memory: %s", error.strerror or error
            )
        self._unwritten = True

    async def _sync(self) -> None:
        try:
            await asyncio.to_thread(self._journal.sync)
        except OSError as error:
            self._complain(error)

    async def _take_leftovers(self) -> None:
        """Add the records of journals that nobody holds, and remove these."""
        try:
            await asyncio.to_thread(remove_partial_files, self._folder)
            found = leftovers(self._folder)
            while (leftover := await asyncio.to_thread(next, found, None)) is not None:
                with leftover:
                    if leftover.records:
                        self._left_since = leftover.records[0].at
                    await self._add_leftover(leftover)
                    self._left_since = None
        except (StoreError, OSError) as error:
            log.warning("Usage that another process left is counted later: %s", error)

    async def _add_leftover(self, leftover: Leftover) -> None:
        for start in range(0, len(leftover.records), MAX_BATCH):
            batch = leftover.records[start : start + MAX_BATCH]
            await self.counts.add(leftover.id, batch, _today())
        await asyncio.to_thread(leftover.remove)
        await self.counts.forget(leftover.id)

    async def _delete_old_days(self) -> None:
        try:
            await self.counts.delete_before(_today() - self._keep_days)
        except StoreError as error:
            log.warning("Usage of old days is deleted later: %s", error.message)

    def _measure(self) -> None:
        oldest = [] if self._left_since is None else [self._left_since]
        if self._pending:
            oldest.append(self._pending[0].at)
        self._lag = max(self._lag, *(time.time() - at for at in oldest), 0.0)
        self._most_pending = max(self._most_pending, len(self._pending))

    def _tell(self) -> None:
        self._measure()
        self._report(self._lag, self._most_pending, self._lost)
        self._lag, self._most_pending, self._lost = 0.0, 0, 0


async def _every(seconds: float, work: Callable[[], Awaitable[None]]) -> None:
    while True:
        try:
            await work()
        except Exception:
            log.exception("The ledger of usage goes on after an error")
        await asyncio.sleep(seconds)


def _today() -> int:
    return int(time.time() // SECONDS_A_DAY)
