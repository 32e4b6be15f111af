"""A JSON body, read strictly: bytes capped while they arrive, no duplicate keys, no lenient numbers.

Knows no route; what the fields mean is the model's business.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError

from server.api.deps import Parts
from server.errors import (
    DeadlineExceeded,
    InvalidField,
    InvalidRequest,
    PolypeftError,
    TooLarge,
    UnsupportedMedia,
    shown,
)
from server.settings import Settings
from server.tracing import span

M = TypeVar("M", bound=BaseModel)
BODY_SECONDS = 60.0


def json_body(model: type[M]) -> Callable[..., Awaitable[M]]:
    """A dependency that yields the request's body as `model`. Raises 400, 413, 415 or 422."""

    async def read(request: Request, parts: Parts) -> M:
        raw = await read_body(request, parts.settings.max_body_bytes)
        return validate(model, parse(raw), parts.settings)

    return read


async def read_body(request: Request, limit: int) -> bytes:
    """At most `limit` bytes; stops reading at the first one over."""
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
    """A client that sends a byte now and then holds no connection for ever. Raises DeadlineExceeded."""
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError:
        raise DeadlineExceeded(f"The body did not arrive within {seconds:g} s.") from None


def refuse_encoding(request: Request) -> None:
    """A compressed body could be any size once unpacked."""
    encoding = request.headers.get("content-encoding", "identity").lower()
    if encoding != "identity":
        raise UnsupportedMedia(f"Content-Encoding must be identity, not {shown(encoding)}.")


def declared_length(request: Request) -> int:
    """Content-Length, 0 when there is none (the server has checked its form)."""
    return int(request.headers.get("content-length", "0"))


def parse(raw: bytes) -> dict[str, Any]:
    """The JSON object in `raw`. NaN and numbers beyond a float pass as such, for their field to refuse."""
    try:
        value = json.loads(raw.decode(), object_pairs_hook=_object)
        if rb"\ud" in raw.lower():  # an escaped surrogate: only in pairs is it a character
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"The body is not UTF-8 at byte {error.start}.", code="invalid_json") from None
    except UnicodeEncodeError:
        raise InvalidRequest("The body holds half a surrogate pair.", code="invalid_json") from None
    except json.JSONDecodeError as error:
        raise InvalidRequest(
            f"The body is not JSON: {error.msg} at character {error.pos}.", code="invalid_json"
        ) from None
    except RecursionError:
        raise InvalidRequest("The body is nested too deeply.", code="invalid_json") from None
    except ValueError:  # an integer of more digits than Python converts
        raise InvalidRequest("The body holds a number with too many digits.", code="invalid_json") from None
    if not isinstance(value, dict):
        raise InvalidRequest("The body must be a JSON object.", code="invalid_json")
    return value


def validate(model: type[M], data: dict[str, Any], settings: Settings) -> M:
    """`data` as `model`, which finds the operator's caps in its validation context."""
    try:
        return model.model_validate(data, context=settings)
    except ValidationError as error:
        raise _first(error) from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise InvalidRequest(f"The body has the key {shown(twice)} twice.", code="invalid_json")
    return found


def _first(error: ValidationError) -> PolypeftError:
    """pydantic's first complaint as one sentence that names the field, the value and the limit."""
    complaint = error.errors(include_url=False, include_context=False)[0]
    field = ".".join(str(part) for part in complaint["loc"]) or "body"
    if complaint["type"] == "missing":
        return InvalidField(f"{field} is required.", param=field, code="missing_field")
    what = complaint["msg"].removeprefix("Input ")
    what = what[:1].lower() + what[1:]
    return InvalidField(f"{field} {what}, not {shown(complaint['input'])}.", param=field)
