"""Streams of server-sent events, and work that is cancelled when its client disconnects. Knows no route.

An event is one `data:` line of JSON, perhaps with an `id:` line before it; a stream ends with [DONE], or with
an error event.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine
from typing import Any, NamedTuple, TypeVar

import msgspec
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from server.api.http.connection import ABORT
from server.api.http.error_responses import error_body
from server.errors import PolypeftError

T = TypeVar("T")
log = logging.getLogger(__name__)
GRACE_SECONDS = 5.0  # after the deadline, for the client to read the last events
DONE = b"data: [DONE]\n\n"


class Identified(NamedTuple):
    """An event with an id, which a reconnecting client sends as Last-Event-ID."""

    id: str
    data: object


class KeepAlive:
    """Sent as a comment, so that proxies do not close a silent stream."""


async def while_connected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`. Cancels it and raises ClientDisconnect if the client disconnects first.

    The body must have been read, so that the next message is the disconnect.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def open_stream(
    request: Request,
    events: AsyncGenerator[object, None],
    headers: dict[str, str] | None = None,
    *,
    deadline: float | None = None,
) -> Response:
    """A stream of `events`, returned once the first is there: an error before it is raised, so that it can be
    answered with its own status.

    `deadline` is the time.time() at which `events` ends by itself. GRACE_SECONDS later the connection is
    aborted if the client has not read them all: the engine does not wait for a slow reader.
    """
    try:
        first = await while_connected(request.receive, anext(events))
    except BaseException:
        await events.aclose()
        raise
    return EventStream(first, events, headers, deadline)


class EventStream(Response):
    """`first`, then the rest of `events`, then [DONE]; or an error event in place of the rest."""

    media_type = "text/event-stream"

    def __init__(
        self,
        first: object,
        events: AsyncGenerator[object, None],
        headers: dict[str, str] | None = None,
        deadline: float | None = None,
    ) -> None:
        fixed = {"cache-control": "no-store", "x-accel-buffering": "no"}
        super().__init__(headers=fixed | (headers or {}))
        del self.headers["content-length"]
        self._first = first
        self._events = events
        self._deadline = deadline

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        timeout = None if self._deadline is None else self._deadline - time.time() + GRACE_SECONDS
        try:
            async with asyncio.timeout(timeout), contextlib.aclosing(self._events):
                await while_connected(receive, self._run(scope, send))
        except TimeoutError:
            abort(scope)
            await _disconnected(receive)
            raise ClientDisconnect from None

    async def _run(self, scope: Scope, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async for data in self._lines(scope):
            await send({"type": "http.response.body", "body": data, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _lines(self, scope: Scope) -> AsyncIterator[bytes]:
        yield _line(self._first)
        try:
            async for event in self._events:
                yield _line(event)
        except PolypeftError as error:
            yield _line(error_body(error))
        except Exception:
            log.exception("Request %s failed in its stream", scope["state"]["request_id"])
            yield _line(error_body(PolypeftError("The server failed on this request.")))
        else:
            yield DONE


def abort(scope: Scope) -> None:
    """Close the request's connection at once, also with data unsent (see Connection)."""
    if (close := scope["state"].get(ABORT)) is not None:
        close()


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _line(event: object) -> bytes:
    if isinstance(event, KeepAlive):
        return b": keep-alive\n\n"
    if isinstance(event, Identified):
        return b"id: " + event.id.encode() + b"\n" + _line(event.data)
    return b"data: " + msgspec.json.encode(event) + b"\n\n"
