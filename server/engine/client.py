"""The API's client of the engine: asyncio on this side, ZeroMQ between the processes.

Knows messages, and nothing of HTTP, text or tensors. Bounded: the engine limits the rows in flight, and a row
yields at most max_tokens chunks. Every row ends in exactly one finish, in its error, or in EngineLost.

A silent engine is not lost: its process may be stopped, starved or swapped out, and continues later. An
engine is lost when its socket disconnects, when another boot answers, or when it reports that its own step
hangs.
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
from server.errors import DeadlineExceeded, EngineLost, Unavailable

log = logging.getLogger(__name__)

SILENCE_SECONDS = 10.0  # an engine without a message for so long (it beats each second) is unresponsive
HELLO_SECONDS = 0.5
DEADLINE_GRACE_SECONDS = 0.5  # the engine ends a late row; after this the client does
MAX_QUEUED_COMMANDS = 10_000  # for an engine that does not read

_Inbox = asyncio.Queue[m.Chunk]
_LOST = "The engine stopped while it worked on this request; send it again."
_HUNG = "A step of the engine has run for {:.0f} s and its bound is {:.0f} s: it hangs, and starts again."


class EngineClient:
    """One connection to one engine. `start` before use, `close` after; both idempotent per object."""

    def __init__(self, address: str, on_stats: Callable[[m.Stats], None] | None = None) -> None:
        self.base: Base | None = None  # kept while the engine restarts, as it serves the same model
        self.limits: dict[str, int] = {}
        self.stats: m.Stats | None = None
        self._address = address
        self._on_stats = on_stats
        self._boot: str | None = None
        self._stats_received = asyncio.Event()  # set while `stats` are those of a connected engine
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
        """The engine has answered Hello and has not been lost since: it will process what is sent."""
        return self._boot is not None

    @property
    def responsive(self) -> bool:
        """The engine is ready and has sent a message within SILENCE_SECONDS."""
        return self.ready and self.silent_seconds < SILENCE_SECONDS

    @property
    def silent_seconds(self) -> float:
        """Seconds since the last message of a connected engine; 0 while there is none."""
        return time.monotonic() - self._last_received if self.ready else 0.0

    @property
    def rows(self) -> int:
        """Rows in flight through this client, waiting ones included."""
        return len(self._rows)

    async def start(self) -> None:
        """Connect and start to send Hello; does not wait for the engine."""
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.SNDHWM, MAX_QUEUED_COMMANDS)
        self._socket.setsockopt(zmq.RCVHWM, 0)  # rows are capped; a dropped chunk would hang its row
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
        """Wait until the engine has answered and sent its Stats, for at most `seconds`."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._stats_received.wait()

    async def close(self) -> None:
        """Disconnect; rows in flight end with EngineLost."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._mark_lost()
        if self._socket is not None and self._context is not None:
            self._socket.disable_monitor()
            self._context.destroy(linger=0)
            self._socket = self._context = self._monitor = self._beats = None

    async def generate(self, *rows: m.Generate) -> AsyncGenerator[m.Chunk, None]:
        """The chunks of `rows` as they arrive, until each row has finished. Closing it cancels the rest.

        Raises Unavailable if the engine takes no requests, EngineLost when it dies, DeadlineExceeded past a
        row's deadline, and the error of a row that failed, which ends its siblings too.
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
                    raise chunk.exception()
                yield chunk
        finally:
            for row_id in open_rows:
                self._rows.pop(row_id, None)
                self._post(m.Cancel(row_id))

    def cancel(self, row_id: str) -> None:
        """End one row of a running `generate`: its stream gets a chunk with finish="cancelled"."""
        if inbox := self._rows.pop(row_id, None):
            inbox.put_nowait(m.Chunk(row_id, finish="cancelled"))
            self._post(m.Cancel(row_id))

    async def check(self, manifest: bytes, *, allow_noop: bool = False) -> m.Checked:
        """Ask whether this base can serve a staged version. Raises EngineLost or Unavailable.

        There is no time limit: the dry run waits for the load of the version and for the rows that run.
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
        """Hint that `adapter` will be used: the engine loads it towards the device."""
        self._post(m.Prefetch(adapter))

    @property
    def boot(self) -> str | None:
        """Id of the connected engine process; None while there is none."""
        return self._boot

    def pin(self, adapters: tuple[m.AdapterRef, ...]) -> bool:
        """Send all pinned adapters of all tenants; False if that could not be sent."""
        return self._post(m.Pins(adapters))

    def forget(self, digest: str) -> None:
        """Drop a deleted version from every tier."""
        self._post(m.Forget(digest))

    def _send(self, command: m.Command) -> None:
        if not self._post(command):
            raise Unavailable("The engine is not taking requests; try again in a moment.")

    def _post(self, command: m.Command) -> bool:
        """Queue a command without waiting; False when the outbox is full or closed."""
        if self._socket is None:
            return False
        sent = asyncio.ensure_future(self._socket.send(m.encode(command), zmq.DONTWAIT))
        return sent.exception() is None  # with DONTWAIT the future is done already

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
            self._mark_lost()  # a restarted engine: _watch_silence sends Hello, and Ready follows
            return
        self.stats = stats
        if self._boot is not None:
            self._stats_received.set()
        if self._on_stats is not None:
            self._on_stats(stats)

    async def _watch_silence(self) -> None:
        """Send Hello until Ready; log when the engine becomes silent and when it sends messages again."""
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
        """End all rows as soon as the engine's end of the socket closes."""
        while self._monitor is not None:
            await self._monitor.recv_multipart()
            self._mark_lost()

    def _mark_lost(self, why: str = _LOST) -> None:
        """The engine is lost: fail its rows and checks. The next Ready connects to a new one."""
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
    """The next chunk; raises DeadlineExceeded.

    asyncio.timeout, not wait_for: that of Python 3.11 loses a cancellation that coincides with a result.
    """
    seconds = None if deadline is None else deadline - time.time() + DEADLINE_GRACE_SECONDS
    try:
        async with asyncio.timeout(seconds):
            return await inbox.get()
    except TimeoutError:
        raise DeadlineExceeded("The request's deadline passed before it finished.") from None
