"""The only crossing from the API to the engine: asyncio on this side, ZeroMQ between.

Knows messages and nothing of HTTP, text or tensors. Bounded: rows in flight never exceed `max_rows`, and
a row yields at most max_tokens chunks. Every row ends in exactly one finish, in its error, or in EngineLost.

Silence is no loss: a process may be stopped, starved or swapped out, and goes on where it was. An engine is
lost when its socket hangs up, when another boot answers, or when it says itself that its step hangs.
"""

import asyncio
import contextlib
import logging
import time
import uuid
from collections.abc import AsyncGenerator, Callable

import zmq
import zmq.asyncio

from server import messages as m
from server.adapters.sites import Base, decode_base
from server.errors import DeadlineExceeded, EngineLost, Unavailable, error_from_code

log = logging.getLogger(__name__)

SILENCE_SECONDS = 10.0  # without a word from the engine (it beats each second) it does not answer
HELLO_SECONDS = 0.5
DEADLINE_GRACE_SECONDS = 0.5  # the engine ends a late row itself; past this we do
MAX_QUEUED_COMMANDS = 10_000  # commands queued for an engine that does not read

_Inbox = asyncio.Queue[m.Chunk]
_LOST = "The engine stopped while it worked on this request; send it again."
_HUNG = "A step of the engine has run for {:.0f} s and its bound is {:.0f} s: it hangs, and starts again."


class EngineClient:
    """One connection to one engine. `start` before use, `close` after; both idempotent per object."""

    def __init__(self, address: str, on_stats: Callable[[m.Stats], None] | None = None) -> None:
        self.base: Base | None = None  # kept while the engine restarts: it serves the same model
        self.limits: dict[str, int] = {}
        self.stats: m.Stats | None = None
        self._address = address
        self._on_stats = on_stats
        self._boot: str | None = None
        self._stats_received = asyncio.Event()  # set while there is a boot whose figures we have
        self._last_received = 0.0
        self._rows: dict[str, _Inbox] = {}
        self._checks: dict[str, asyncio.Future[m.Checked]] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._context: zmq.asyncio.Context | None = None
        self._socket: zmq.asyncio.Socket | None = None
        self._monitor: zmq.asyncio.Socket | None = None
        self._beats: zmq.asyncio.Socket | None = None

    @property
    def ready(self) -> bool:
        """The engine answered Hello and has not been lost since: what it is sent, it will do."""
        return self._boot is not None

    @property
    def responsive(self) -> bool:
        """It is ready, and spoke within the last SILENCE_SECONDS: what it is sent, it does now."""
        return self.ready and self.silent_seconds < SILENCE_SECONDS

    @property
    def silent_seconds(self) -> float:
        """Seconds since the last word of an engine that is there; 0 while there is none."""
        return time.monotonic() - self._last_received if self.ready else 0.0

    @property
    def rows(self) -> int:
        """Rows in flight through this client, waiting ones included."""
        return len(self._rows)

    async def start(self) -> None:
        """Connect and begin to say Hello; does not wait for the engine."""
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.SNDHWM, MAX_QUEUED_COMMANDS)
        self._socket.setsockopt(zmq.RCVHWM, 0)  # rows are capped: dropping a chunk would hang one
        self._socket.connect(self._address)
        self._monitor = self._socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        self._beats = self._context.socket(zmq.SUB)
        self._beats.connect(m.beat_address(self._address))
        self._beats.subscribe(b"")
        loops = (
            self._receive(self._socket),
            self._receive(self._beats),
            self._watch_silence(),
            self._watch_disconnects(),
        )
        self._tasks = [asyncio.create_task(loop) for loop in loops]

    async def wait_for_stats(self, seconds: float) -> None:
        """Returns when the engine has answered and told its figures, or after so long without that."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._stats_received.wait()

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._mark_lost()
        if self._socket is not None and self._context is not None:
            self._socket.disable_monitor()
            self._context.destroy(linger=0)
            self._socket = self._context = self._monitor = self._beats = None

    async def generate(self, *rows: m.Generate) -> AsyncGenerator[m.Chunk, None]:
        """The chunks of `rows` as they come, until each row has finished. Closing it cancels the rest.

        Raises EngineLost when the engine dies, DeadlineExceeded past a row's deadline, and what the engine
        says about a row that failed: a failed row ends its siblings too.
        """
        if not self.ready:
            raise Unavailable("The engine is not ready; try again in a moment.")
        inbox: _Inbox = asyncio.Queue()
        open_rows = {row.id for row in rows}
        deadline = min((row.deadline for row in rows if row.deadline is not None), default=None)
        self._rows.update(dict.fromkeys(open_rows, inbox))
        try:
            self._send(m.Request(rows))
            while open_rows:
                chunk = await _next(inbox, deadline)
                if chunk.finish is not None:
                    open_rows.discard(chunk.id)
                    self._rows.pop(chunk.id, None)
                if chunk.error is not None:
                    raise error_from_code(*chunk.error)
                yield chunk
        finally:
            for row_id in open_rows:
                self._rows.pop(row_id, None)
                self._post(m.Cancel(row_id))

    def cancel(self, row_id: str) -> None:
        """End one row of a running `generate`, whose stream sees it finish as "cancelled"."""
        if inbox := self._rows.pop(row_id, None):
            inbox.put_nowait(m.Chunk(row_id, finish="cancelled"))
            self._post(m.Cancel(row_id))

    async def check(self, manifest: bytes, *, allow_noop: bool = False) -> m.Checked:
        """Ask whether this base can serve a staged version. Raises EngineLost or Unavailable.

        It takes as long as it takes: a trial waits for its load and for the rows that run.
        """
        if not self.ready:
            raise Unavailable("The engine is not ready; try again in a moment.")
        check = m.Check(uuid.uuid4().hex, manifest, allow_noop)
        answer: asyncio.Future[m.Checked] = asyncio.get_running_loop().create_future()
        self._checks[check.id] = answer
        try:
            self._send(check)
            return await answer
        finally:
            self._checks.pop(check.id, None)

    def prefetch(self, adapter: m.AdapterRef) -> None:
        """A hint: bring `adapter` towards the device."""
        self._post(m.Prefetch(adapter))

    @property
    def boot(self) -> str | None:
        """Which life of the engine this is; None while there is none."""
        return self._boot

    def pin(self, adapters: tuple[m.AdapterRef, ...]) -> bool:
        """All that is pinned, by all tenants; False if it could not be sent."""
        return self._post(m.Pins(adapters))

    def forget(self, digest: str) -> None:
        """A version is deleted: drop it from every tier."""
        self._post(m.Forget(digest))

    def _send(self, command: m.Command) -> None:
        if not self._post(command):
            raise Unavailable("The engine is not taking requests; try again in a moment.")

    def _post(self, command: m.Command) -> bool:
        """Queue a command without waiting; False when the outbox is full or closed."""
        if self._socket is None:
            return False
        sent = asyncio.ensure_future(self._socket.send(m.encode(command), zmq.DONTWAIT))
        return sent.exception() is None  # with DONTWAIT it is a future that is done already

    async def _receive(self, socket: zmq.asyncio.Socket) -> None:
        while True:
            self._handle(m.decode_event(await socket.recv()))

    def _handle(self, event: m.Event) -> None:
        self._last_received = time.monotonic()
        match event:
            case m.Chunks(chunks):
                for chunk in chunks:
                    if inbox := self._rows.get(chunk.id):
                        inbox.put_nowait(chunk)
            case m.Stats():
                self._handle_stats(event)
            case m.Beat(boot, seconds, bound):
                if boot == self._boot and seconds > bound:
                    log.error("A step of the engine hangs: %.0f s, its bound is %.0f s", seconds, bound)
                    self._mark_lost(_HUNG.format(seconds, bound))
            case m.Checked():
                answer = self._checks.get(event.id)
                if answer is not None and not answer.done():
                    answer.set_result(event)
            case m.Ready():
                if event.boot != self._boot:
                    self._mark_lost()
                self.base, self.limits, self._boot = decode_base(event.base), event.limits, event.boot

    def _handle_stats(self, stats: m.Stats) -> None:
        if self._boot is not None and stats.boot != self._boot:
            self._mark_lost()  # a restarted engine: _watch says Hello and its Ready follows
            return
        self.stats = stats
        if self._boot is not None:
            self._stats_received.set()
        if self._on_stats is not None:
            self._on_stats(stats)

    async def _watch_silence(self) -> None:
        """Say Hello until Ready; note when the engine falls silent, and when it is heard again."""
        silent = False
        while True:
            if not self.ready:
                self._post(m.Hello())
                silent = False
            elif silent == self.responsive:
                silent = not silent
                log.warning("The engine is %s", "silent; its rows wait for it" if silent else "heard again")
            await asyncio.sleep(HELLO_SECONDS)

    async def _watch_disconnects(self) -> None:
        """An engine that dies closes its end, and its rows end at once."""
        while self._monitor is not None:
            await self._monitor.recv_multipart()
            self._mark_lost()

    def _mark_lost(self, why: str = _LOST) -> None:
        """The engine is gone, and all it worked on; the next Ready starts afresh."""
        self._boot = None
        self._stats_received.clear()
        self.drop_rows(why)
        for answer in self._checks.values():
            if not answer.done():
                answer.set_exception(EngineLost(why))

    def drop_rows(self, why: str = _LOST) -> None:
        """End every row in flight with EngineLost."""
        rows, self._rows = self._rows, {}
        for row_id, inbox in rows.items():
            inbox.put_nowait(m.Chunk.failure(row_id, EngineLost(why)))


async def _next(inbox: _Inbox, deadline: float | None) -> m.Chunk:
    """asyncio.timeout, never wait_for: Python 3.11's drops a cancellation that meets a result."""
    seconds = None if deadline is None else deadline - time.time() + DEADLINE_GRACE_SECONDS
    try:
        async with asyncio.timeout(seconds):
            return await inbox.get()
    except TimeoutError:
        raise DeadlineExceeded("The request's deadline passed before it finished.") from None
