"""The server-sent events of a streamed answer."""

from collections.abc import Iterator
from contextlib import suppress
from typing import Any, NamedTuple

import httpx
from httpx_sse import EventSource, SSEError

from server.cli.http_client import answer, refusal
from server.errors import Unavailable


class Event(NamedTuple):
    id: str  # sent as Last-Event-ID to resume after this event; "" if the stream has no ids
    data: dict[str, Any]


def read_events(response: httpx.Response) -> Iterator[Event]:
    """The events until [DONE]. Raises the error that the server sends, before or within the stream.

    Raises Unavailable if the stream ends without [DONE].
    """
    if not response.is_success:
        answer(response)
    with suppress(SSEError):  # no event stream at all: a proxy's page, perhaps
        for event in EventSource(response).iter_sse():
            if event.data == "[DONE]":
                return
            if not event.data:  # a keep-alive comment after an event with an id
                continue
            data = event.json()
            if "error" in data:
                raise refusal(event.data, "The server ended the answer.")
            yield Event(event.id, data)
    raise Unavailable("The server's answer was cut.")
