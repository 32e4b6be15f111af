"""The audit log in Valkey. Knows no HTTP.

    pp:audit:{tenant}     stream   the tenant's entries (`operator`: those of no tenant), as JSON in `entry`
    pp:audit:begun        hash     token -> Begun: changes that have begun and whose outcome is not written

Nothing changes an entry, and each tenant's are bounded by age and number: a tenant that makes many drops its
own oldest ones only. A change is written down before it begins, and refused if that fails. When it ends, its
entry joins the stream with the outcome. If the process ends between, `settle_lost` does that later, with the
outcome "unknown". So no change is without an entry, and each has one.
"""

import asyncio
import logging
import re
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

import msgspec
from redis.asyncio import Redis

from adapters_store.valkey import store_errors, text
from server.audit.entry import Entry, Position, Recorded
from server.errors import PolypeftError, StoreError

log = logging.getLogger(__name__)
BEGUN = "pp:audit:begun"
STREAM = "pp:audit:"
OPERATORS = "operator"  # the stream of what belongs to no tenant
SECRET = re.compile(rb"pp-[A-Za-z0-9_-]{20,}")
DAY = 86_400
END_SECONDS = 2.0  # how long an answer waits for its outcome to be written
LOST_SECONDS = 3600.0  # a change that began longer ago has lost its process
SETTLE_SECONDS = 600.0  # between two looks for such changes

# KEYS: pp:audit:begun, the stream. ARGV: token, entry, most entries, milliseconds that one is kept. Once a
# token, however often it is sent. A stream whose newest entry is too old goes as a whole.
END = """
local begun, stream = unpack(KEYS)
local token, entry, max, kept = unpack(ARGV)
if redis.call('HDEL', begun, token) == 0 then return 0 end
redis.call('XADD', stream, 'MAXLEN', '~', max, '*', 'entry', entry)
local time = redis.call('TIME')
redis.call('XTRIM', stream, 'MINID', '~', string.format('%.0f', time[1] * 1000 - kept))
redis.call('PEXPIRE', stream, kept)
return 1
"""


class Begun(msgspec.Struct, frozen=True):
    tenant: str  # whose log it will be in, if its process ends before it says so
    at: float  # Unix seconds
    entry: Entry


class Span(NamedTuple):
    """From when to when, in Unix seconds, both included."""

    since: float = 0.0
    until: float | None = None


class AuditLog:
    """`days`: how long an entry is kept; `max_entries`: of a tenant, roughly."""

    def __init__(self, redis: Redis, days: int, max_entries: int) -> None:
        self._redis = redis
        self._kept_seconds = days * DAY
        self._max_entries = max_entries
        self._end = redis.register_script(END)
        self._ending: set[asyncio.Task[None]] = set()

    async def begin(self, token: str, tenant: str, entry: Entry) -> None:
        """Write down that a change begins. Raises StoreError: then it must not begin."""
        begun = Begun(tenant, time.time(), entry)
        with store_errors():
            await self._redis.hset(BEGUN, token, SECRET.sub(b"pp-...", msgspec.json.encode(begun)))

    async def end(self, token: str, tenant: str, entry: Entry) -> None:
        """Write the entry of a change that has ended. Waits for Valkey a moment only; if it does not answer
        after that either, `settle_lost` writes the entry. Raises nothing.
        """
        task = asyncio.create_task(self._try_to_end(token, tenant, entry))
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)
        await asyncio.wait({task}, timeout=END_SECONDS)

    async def close(self) -> None:
        """Wait for entries that are being written, a moment."""
        if self._ending:
            await asyncio.wait(self._ending, timeout=END_SECONDS)

    @asynccontextmanager
    async def change(self, token: str, tenant: str, entry: Entry) -> AsyncIterator[None]:
        """A change that the server makes by itself, in the block."""
        await self.begin(token, tenant, entry)
        try:
            yield
        except PolypeftError as error:
            await self.end(token, tenant, outcome_of(entry, error.status))
            raise
        await self.end(token, tenant, outcome_of(entry, 0))

    async def settle_lost(self, older_than: float = LOST_SECONDS) -> int:
        """Give changes whose process has ended their entries; how many."""
        with store_errors():
            all_begun: Any = await self._redis.hgetall(BEGUN)
        lost = 0
        for token, value in all_begun.items():
            begun = msgspec.json.decode(value, type=Begun)
            if begun.at < time.time() - older_than:
                await self._append(text(token), begun.tenant, begun.entry)
                lost += 1
        return lost

    async def keep_settled(self, longest_request: float) -> None:
        """Call `settle_lost` every SETTLE_SECONDS, for ever. `longest_request`: seconds a change may take."""
        older_than = max(LOST_SECONDS, longest_request)
        while True:
            try:
                if lost := await self.settle_lost(older_than):
                    log.warning("The audit log has %d changes of unknown outcome", lost)
            except StoreError as error:
                log.warning("Changes of unknown outcome could not be looked for: %s", error.message)
            await asyncio.sleep(SETTLE_SECONDS)

    async def read(
        self, starts: Sequence[tuple[str, Position | None]], span: Span, count: int
    ) -> list[list[Recorded]]:
        """For each (tenant, position): up to `count` of the tenant's entries in `span` that come after the
        position, newest first. One call of Valkey for all.
        """
        with store_errors():
            async with self._redis.pipeline(transaction=False) as pipeline:
                for tenant, after in starts:
                    newest, oldest = self._range(tenant, after, span)
                    pipeline.xrevrange(f"{STREAM}{tenant}", max=newest, min=oldest, count=count)
                answers: Any = await pipeline.execute()
        return [
            [_recorded(tenant, id_, fields) for id_, fields in found or ()]
            for (tenant, _), found in zip(starts, answers, strict=True)
        ]

    def _range(self, tenant: str, after: Position | None, span: Span) -> tuple[str, str]:
        """The newest and the oldest id to read of a tenant's stream."""
        oldest = str(round(max(span.since, time.time() - self._kept_seconds) * 1000))
        newest = "+" if span.until is None else str(round(span.until * 1000))
        if after is not None and (span.until is None or after.milliseconds <= round(span.until * 1000)):
            newest = after.stream_id if tenant > after.tenant else f"({after.stream_id}"
        return newest, oldest

    async def _try_to_end(self, token: str, tenant: str, entry: Entry) -> None:
        try:
            await self._append(token, tenant, entry)
        except StoreError:
            log.warning("The outcome of %s could not be written to the audit log", entry.action)

    async def _append(self, token: str, tenant: str, entry: Entry) -> None:
        with store_errors():
            await self._end(
                keys=[BEGUN, f"{STREAM}{tenant}"],
                args=[token, _encoded(entry), self._max_entries, self._kept_seconds * 1000],
            )


def outcome_of(entry: Entry, status: int) -> Entry:
    """The entry of a change that was answered with this HTTP status."""
    outcome = "done" if status < 400 else "refused" if status < 500 else "failed"
    return msgspec.structs.replace(entry, outcome=outcome, status=status)


def _encoded(entry: Entry) -> bytes:
    """The entry as JSON, without a key's secret that a caller may have put into a path or a name."""
    return SECRET.sub(b"pp-...", msgspec.json.encode(entry))


def _recorded(tenant: str, id_: bytes, fields: dict[bytes, bytes]) -> Recorded:
    milliseconds, _, sequence = text(id_).partition("-")
    position = Position(int(milliseconds), int(sequence), tenant)
    return Recorded(position, msgspec.json.decode(fields[b"entry"], type=Entry))
