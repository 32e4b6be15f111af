"""A client's connection: uvicorn's HTTP protocol, with bounds on memory and time.

uvicorn and httptools accept heads of any size at any speed, and wait for ever for a client to read. Here a
connection over a bound is closed, after an error object where one can be sent. Knows no route.
"""

import asyncio
import uuid
from typing import Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from server.api.http.error_responses import error_response
from server.errors import HeadTimeout, HeadTooLarge, InvalidRequest, PolypeftError, Unavailable, UrlTooLong

MAX_HEAD_BYTES = 65_536  # of the URL and all header fields
MAX_HEADERS = 100
MAX_URL_BYTES = 8192
MAX_PIPELINED = 16  # requests that wait on the connection while one is answered
HEAD_SECONDS = 20.0  # for the head of a request to arrive
SEND_SECONDS = 60.0  # for a client to read some of a full send buffer
LINGER_SECONDS = 2.0  # for a client that may still be sending to read the error
ABORT = "abort_connection"  # key in a request's state: a function that closes its connection at once

Timer = asyncio.TimerHandle | None


class Connection(HttpToolsProtocol):
    """`Config.limit_concurrency` is the most connections of a process. One more closes the connection that
    has been idle longest; if none is idle, the new one gets 503.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._max_connections = self.limit_concurrency
        self.limit_concurrency = None  # uvicorn would answer in plain text
        self._in_head = True
        self._head_bytes = 0  # of the URL and the complete header fields
        self._unreported_bytes = 0  # fed to the parser since its last callback
        self._error: PolypeftError | None = None  # what a callback of the parser raised
        self._refused = False
        self.idle_since = self.loop.time()
        self._head_timer: Timer = None
        self._send_timer: Timer = None

    @property
    def idle(self) -> bool:
        """No request is being answered or waits to be."""
        return self.cycle is None or self.cycle.response_complete

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._head_timer = self.loop.call_later(HEAD_SECONDS, self._head_is_late)
        if self._max_connections is not None and len(self.connections) > self._max_connections:
            self._close_longest_idle()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_head_timer()
        self._stop_send_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.idle and self._head_timer is None:
            self._head_timer = self.loop.call_later(HEAD_SECONDS, self._head_is_late)
        for start in range(0, len(data), MAX_HEAD_BYTES):
            if self._refused or self.transport.is_closing():
                return
            piece = data[start : start + MAX_HEAD_BYTES]
            self._unreported_bytes += len(piece)
            super().data_received(piece)
            if self._unreported_bytes > MAX_HEAD_BYTES:  # one endless header field, or chunk header
                self._refuse(_head_too_large())

    # callbacks of the parser; an exception in one makes uvicorn call send_400_response

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._unreported_bytes = 0
        self.scope["state"][ABORT] = self.transport.abort

    def on_url(self, url: bytes) -> None:
        super().on_url(url)
        self._count_head_bytes(len(url))
        if len(self.url) > MAX_URL_BYTES:
            self._error = UrlTooLong(f"The URL is longer than {MAX_URL_BYTES} bytes.")
            raise self._error

    def on_header(self, name: bytes, value: bytes) -> None:
        super().on_header(name, value)
        self._count_head_bytes(len(name) + len(value))
        if len(self.headers) > MAX_HEADERS:
            self._error = HeadTooLarge(f"The request has more than {MAX_HEADERS} header fields.")
            raise self._error

    def on_headers_complete(self) -> None:
        self._unreported_bytes = 0
        self._in_head = False
        self._stop_head_timer()
        if len(self.pipeline) >= MAX_PIPELINED:
            self._error = InvalidRequest(f"More than {MAX_PIPELINED} requests were sent ahead.")
            raise self._error
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._unreported_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._in_head, self._head_bytes, self._unreported_bytes = True, 0, 0
        if self.idle and self._head_timer is not None:  # the rest of a body whose request is answered
            self._stop_head_timer()
            self._start_keep_alive()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self.idle_since = self.loop.time()

    def send_400_response(self, msg: str) -> None:  # noqa: ARG002 - uvicorn's signature
        """uvicorn calls it when the parser raised."""
        self._refuse(self._error or InvalidRequest("The request is not valid HTTP."))

    # timers

    def timeout_keep_alive_handler(self) -> None:
        """Unlike uvicorn's, does not wait until an unread answer is sent."""
        self.transport.abort()

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._send_timer is None:
            self._send_timer = self.loop.call_later(SEND_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        self._stop_send_timer()
        super().resume_writing()

    def _head_is_late(self) -> None:
        self._head_timer = None
        if not self.idle:
            return  # the keep-alive timer starts after the answer
        if self._in_head and self._head_bytes + self._unreported_bytes:
            self._refuse(HeadTimeout(f"The head of the request did not arrive within {HEAD_SECONDS:g} s."))
        else:
            self.transport.abort()

    def _stop_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _stop_send_timer(self) -> None:
        if self._send_timer is not None:
            self._send_timer.cancel()
            self._send_timer = None

    def _start_keep_alive(self) -> None:
        self._unset_keepalive_if_required()
        self.timeout_keep_alive_task = self.loop.call_later(
            self.timeout_keep_alive, self.timeout_keep_alive_handler
        )

    # refusals

    def _count_head_bytes(self, size: int) -> None:
        self._unreported_bytes = 0
        self._head_bytes += size
        if self._head_bytes > MAX_HEAD_BYTES:
            self._error = _head_too_large()
            raise self._error

    def _close_longest_idle(self) -> None:
        idle = [other for other in self.connections if isinstance(other, Connection) and other.idle]
        oldest = min(idle, key=lambda other: other.idle_since)
        if oldest is not self:
            oldest.transport.abort()
            return
        self._refuse(Unavailable("Too many connections are open; try again in a moment."), linger=0)

    def _refuse(self, error: PolypeftError, linger: float = LINGER_SECONDS) -> None:
        """Send `error`, unless another answer has begun, and close."""
        self._refused = True
        self._stop_head_timer()
        if not self.idle:
            self.cycle.disconnected = True  # its request will not be complete
            self.cycle.message_event.set()
        if self.pipeline or (not self.idle and self.cycle.response_started):
            self.transport.abort()
            return
        self.transport.write(_answer(error))
        if linger and self.transport.can_write_eof():
            self.transport.write_eof()
            self.loop.call_later(linger, self.transport.abort)
        else:
            self.transport.close()


def _head_too_large() -> HeadTooLarge:
    return HeadTooLarge(f"The head of the request is larger than {MAX_HEAD_BYTES} bytes.")


def _answer(error: PolypeftError) -> bytes:
    """A complete HTTP answer, with `connection: close`."""
    response = error_response(error)
    headers = [*response.raw_headers, (b"x-request-id", b"req_" + uuid.uuid4().hex.encode())]
    lines = b"".join(b"%b: %b\r\n" % field for field in headers)
    return STATUS_LINE[error.status] + lines + b"connection: close\r\n\r\n" + bytes(response.body)
