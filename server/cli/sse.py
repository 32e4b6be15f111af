"""Server-sent events, as our server writes them."""

import json
from collections.abc import Iterator
from typing import Any, NamedTuple

import httpx

from server.cli.http_client import answer, refusal
from server.errors import Unavailable


class Event(NamedTuple):
    id: str  # what a client who comes back names as the last it saw; "" where events have none
    data: dict[str, Any]


def read_events(response: httpx.Response) -> Iterator[Event]:
    """Those of one streamed answer. Raises what the server says went wrong, also midway; Unavailable if it
    ends without its end.
    """
    if not response.is_success:
        answer(response)
    id_ = ""
    for line in response.iter_lines():
        kind, _, text = line.partition(": ")
        if kind == "id":
            id_ = text
        if kind != "data":
            continue
        if text == "[DONE]":
            return
        data = json.loads(text)
        if "error" in data:
            raise refusal(text, "The server ended the answer.")
        yield Event(id_, data)
    raise Unavailable("The server's answer was cut.")
