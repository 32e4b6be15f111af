"""A JSON body, read strictly: its bytes are capped while they arrive, its values counted before it is parsed.
Then pydantic validates it as a model (see body_model.py). Knows no route.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from anyio.to_thread import run_sync
from fastapi import Request
from pydantic import BaseModel, ValidationError

from server.api.http.dependencies import Deps
from server.api.http.error_responses import first_error
from server.api.http.request_limits import max_body_bytes, max_values
from server.errors import DeadlineExceeded, InvalidField, InvalidRequest, TooLarge, UnsupportedMedia, shown
from server.json_reader import JsonError, is_deeper, read_json
from server.settings import Settings
from server.tracing import span

M = TypeVar("M", bound=BaseModel)
BODY_SECONDS = 60.0  # for a body to arrive
MAX_INLINE_BYTES = 16_384  # a larger body is parsed on a thread, off the event loop
MAX_CONTAINERS = 10_000  # lists, and as many objects
MAX_MEMBERS = 20_000  # fields of all objects together
MAX_DEPTH = 128
_COUNTED_BY_MARK = {b"[": "lists", b"{": "objects", b":": "fields", b",": "values"}


def json_body(model: type[M]) -> Callable[..., Awaitable[M]]:
    """A dependency that yields the request's body as `model`. Raises 400, 413 or 415."""

    async def read(request: Request, deps: Deps) -> M:
        raw = await read_body(request, max_body_bytes(deps))
        values = max_values(deps)
        if len(raw) <= MAX_INLINE_BYTES:
            return validate(model, parse(raw, values), deps.settings)
        return await run_sync(lambda: validate(model, parse(raw, values), deps.settings))

    read.model = model  # type: ignore[attr-defined]  # for the OpenAPI document
    return read


async def read_body(request: Request, limit: int) -> bytes:
    """At most `limit` bytes. Raises UnsupportedMedia, DeadlineExceeded, TooLarge at the first byte over."""
    kind = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise UnsupportedMedia(f"Content-Type must be application/json, not {shown(kind)}.")
    refuse_encoding(request)
    too_large = TooLarge(f"The body is larger than {limit} bytes.")
    if declared_length(request) > limit:
        raise too_large
    body = bytearray()
    with span("receive"):
        async with arriving_within(BODY_SECONDS):
            async for chunk in request.stream():
                body += chunk
                if len(body) > limit:
                    raise too_large
    return bytes(body)


@asynccontextmanager
async def arriving_within(seconds: float) -> AsyncIterator[None]:
    """Raise DeadlineExceeded if the body has not arrived in time, however slowly the client sends."""
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError:
        raise DeadlineExceeded(f"The body did not arrive within {seconds:g} s.") from None


def refuse_encoding(request: Request) -> None:
    """Raise UnsupportedMedia for a compressed body, which could be any size once unpacked."""
    encoding = request.headers.get("content-encoding", "identity").lower()
    if encoding != "identity":
        raise UnsupportedMedia(f"Content-Encoding must be identity, not {shown(encoding)}.")


def declared_length(request: Request) -> int:
    """Content-Length, 0 when there is none (the server has checked its form)."""
    return int(request.headers.get("content-length", "0"))


def parse(raw: bytes, values: int = MAX_MEMBERS) -> dict[str, Any]:
    """The JSON object in `raw`, of at most `values` values. NaN and numbers beyond a float pass: the model's
    fields refuse them. Raises InvalidRequest, InvalidField.
    """
    _check_counts(raw, values)
    try:
        value = read_json(raw, allow_nan=True)
    except JsonError as error:
        raise InvalidRequest(f"The body {error.reason}.", code="invalid_json") from None
    if not isinstance(value, dict):
        raise InvalidRequest("The body must be a JSON object.", code="invalid_json")
    if is_deeper(value, MAX_DEPTH):
        raise InvalidRequest(f"The body is nested deeper than {MAX_DEPTH} levels.", code="invalid_json")
    return value


def validate(model: type[M], data: dict[str, Any], settings: Settings) -> M:
    """`data` as `model`, with the operator's caps as its validation context. Raises InvalidField."""
    try:
        return model.model_validate(data, context=settings)
    except ValidationError as error:
        raise first_error(error.errors(include_url=False, include_context=False)) from None


def _check_counts(raw: bytes, values: int) -> None:
    """Raise InvalidField for more lists, fields or values than a request can need.

    Parsing takes far more time than two or three bytes suggest: half a second for a megabyte of empty lists.
    """
    limits = {b"[": MAX_CONTAINERS, b"{": MAX_CONTAINERS, b":": MAX_MEMBERS, b",": values}
    if all(raw.count(mark) <= limit for mark, limit in limits.items()):
        return
    marks = _outside_strings(raw)
    for mark, limit in limits.items():
        if (count := marks.count(mark)) > limit:
            raise InvalidField(f"The body must have at most {limit} {_COUNTED_BY_MARK[mark]}, not {count}.")


def _outside_strings(raw: bytes) -> bytes:
    """`raw` without its strings."""
    return b"".join(raw.replace(rb"\\", b"").replace(rb"\"", b"").split(b'"')[::2])
