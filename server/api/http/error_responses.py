"""JSON answers, and errors in OpenAI's shape: {"error": {"message", "type", "param", "code"}}."""

import math
from collections.abc import Sequence
from typing import Any

import msgspec
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.routing import Match

from server.errors import (
    InvalidField,
    InvalidRequest,
    NotFound,
    PolypeftError,
    RateLimited,
    Unavailable,
    disk_error,
    shown,
)

RETRY_AFTER_SECONDS = 1
MAX_RETRY_AFTER_SECONDS = 60  # the `openai` client for Node ignores a longer one


def error_body(error: PolypeftError) -> dict[str, Any]:
    return {"error": {"message": error.message, "type": error.type, "param": error.param, "code": error.code}}


def error_response(error: PolypeftError) -> Response:
    """The answer to a request that raised `error`, with the headers that its status calls for."""
    headers = {}
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if isinstance(error, RateLimited | Unavailable) and error.status in {429, 503}:
        headers |= _retry_headers(error.wait)
    elif error.status in {429, 503}:
        headers["Retry-After"] = str(RETRY_AFTER_SECONDS)
    return json_response(error_body(error), error.status, headers)


def _retry_headers(wait: float | None) -> dict[str, str]:
    """When to send the request again; None: never. The `openai` clients go by each of these."""
    if wait is None:
        return {"x-should-retry": "false"}
    seconds = min(max(wait, 0.001), MAX_RETRY_AFTER_SECONDS)
    return {"Retry-After": str(math.ceil(seconds)), "retry-after-ms": str(math.ceil(seconds * 1000))}


def json_response(content: object, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """`content` as JSON. msgspec is several times faster than the standard library, and never writes NaN."""
    return Response(msgspec.json.encode(content), status, headers, media_type="application/json")


def first_error(errors: Sequence[Any]) -> InvalidField:
    """pydantic's first error as one sentence that names the field, the value and the limit."""
    error = errors[0]
    field = ".".join(shown(part).strip("'") for part in error["loc"]) or "body"  # keys may be anything
    if error["type"] == "missing":
        return InvalidField(f"{field} is required.", param=field, code="missing_field")
    what = error["msg"].removeprefix("Input ")
    what = what[:1].lower() + what[1:]
    return InvalidField(f"{field} {what}, not {shown(error['input'])}.", param=field)


def add_handlers(app: FastAPI) -> None:
    """Register the handlers of known errors. RequestMiddleware answers all others."""
    app.add_exception_handler(PolypeftError, _on_polypeft_error)
    app.add_exception_handler(RequestValidationError, _on_invalid_parameter)
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.add_exception_handler(OSError, _on_os_error)


def _on_polypeft_error(_request: Request, error: Exception) -> Response:
    if not isinstance(error, PolypeftError):
        raise error
    return error_response(error)


def _on_invalid_parameter(_request: Request, error: Exception) -> Response:
    """A value of the query, the path or a header that is not of its type."""
    if not isinstance(error, RequestValidationError):
        raise error
    first = error.errors()[0]
    return error_response(first_error([first | {"loc": first["loc"][1:]}]))  # without "query" or "path"


def _on_os_error(_request: Request, error: Exception) -> Response:
    """A full or read-only disk. Raises any other error again."""
    refusal = disk_error(error)
    if refusal is None:
        raise error
    return error_response(refusal)


def _on_http_exception(request: Request, error: Exception) -> Response:
    """Starlette's own errors: no such route, or not that method."""
    if not isinstance(error, HTTPException):
        raise error
    refusal: PolypeftError
    headers = dict(error.headers or {})
    if error.status_code == 404:
        refusal = NotFound("There is no such route.")
    elif error.status_code == 405:
        refusal = InvalidRequest("This route does not take that method.", code="method_not_allowed")
        headers["Allow"] = ", ".join(_methods(request))  # Starlette names those of one handler only
    else:
        refusal = InvalidRequest("The request was refused.")
    return json_response(error_body(refusal), error.status_code, headers)


def _methods(request: Request) -> list[str]:
    """The methods that the request's path takes."""
    methods = [
        method
        for method in ("GET", "POST", "PUT", "PATCH", "DELETE")
        if any(
            route.matches({**request.scope, "method": method})[0] is Match.FULL
            for route in request.app.routes
        )
    ]
    return [*methods, "HEAD"] if "GET" in methods else methods
