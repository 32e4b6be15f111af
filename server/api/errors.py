"""Every refusal in OpenAI's shape: {"error": {"message", "type", "param", "code"}}. Knows no route."""

from typing import Any

import msgspec
from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException

from server.errors import Forbidden, InvalidRequest, NotFound, PolypeftError, disk_error

RETRY_AFTER_SECONDS = 1


def error_body(error: PolypeftError) -> dict[str, Any]:
    return {"error": {"message": error.message, "type": error.type, "param": error.param, "code": error.code}}


def error_response(error: PolypeftError) -> Response:
    headers = {}
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if error.status in {429, 503}:
        headers["Retry-After"] = str(RETRY_AFTER_SECONDS)
    return json_response(error_body(error), error.status, headers)


def json_response(content: object, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """msgspec writes JSON several times faster than the standard library, and NaN never."""
    return Response(msgspec.json.encode(content), status, headers, media_type="application/json")


def add_handlers(app: FastAPI) -> None:
    """What no handler catches, an unknown exception, is the Envelope's to answer."""
    app.add_exception_handler(PolypeftError, _on_ours)
    app.add_exception_handler(HTTPException, _on_http)
    app.add_exception_handler(OSError, _on_disk)


def _on_ours(_request: Request, error: Exception) -> Response:
    if not isinstance(error, PolypeftError):
        raise error
    return error_response(error)


def _on_disk(_request: Request, error: Exception) -> Response:
    """A file of ours that could not be written for want of room; any other is not foreseen."""
    refusal = disk_error(error)
    if refusal is None:
        raise error
    return error_response(refusal)


def _on_http(_request: Request, error: Exception) -> Response:
    """The framework's own: no such route, or not that method."""
    if not isinstance(error, HTTPException):
        raise error
    refusal: PolypeftError
    if error.status_code == 404:
        refusal = NotFound("There is no such route.")
    elif error.status_code == 405:
        refusal = InvalidRequest("This route does not take that method.", code="method_not_allowed")
    else:
        refusal = Forbidden("The request was refused.")
    return json_response(error_body(refusal), error.status_code, dict(error.headers or {}))
