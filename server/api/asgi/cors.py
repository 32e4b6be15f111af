"""Answers to web pages of other origins: preflights, and headers by which a browser lets them read an answer.

Starlette's middleware, outside of ours: errors have the headers as well, or a page could not read them.
"""

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp

from server.api.http.error_responses import error_response
from server.errors import Forbidden, shown

METHODS = ("GET", "HEAD", "POST", "PUT", "DELETE")
MAX_AGE_SECONDS = 7200  # the longest that Chromium keeps a preflight
# What the `openai` client for browsers reads, and what our own routes answer with
EXPOSED = (
    "x-request-id",
    "retry-after",
    "retry-after-ms",
    "x-should-retry",
    "x-ratelimit-limit-requests",
    "x-ratelimit-limit-tokens",
    "x-ratelimit-remaining-requests",
    "x-ratelimit-remaining-tokens",
    "x-ratelimit-reset-requests",
    "x-ratelimit-reset-tokens",
    "x-polypeft-adapter",
    "etag",
    "location",
)


class CrossOrigin(CORSMiddleware):
    """For pages of `origins`, or of all if "*" is among them. A key comes in a header: no credentials."""

    def __init__(self, app: ASGIApp, origins: list[str]) -> None:
        super().__init__(
            app,
            allow_origins=origins,
            allow_methods=METHODS,
            allow_headers=["*"],  # those that are asked for: the clients' own grow with their releases
            allow_private_network=True,
            expose_headers=EXPOSED,
            max_age=MAX_AGE_SECONDS,
        )

    def preflight_response(self, request_headers: Headers) -> Response:
        """Needs no key; from elsewhere, or for another method, it is refused."""
        response = super().preflight_response(request_headers)
        if response.status_code == 200:
            return response
        origin, method = (request_headers[name] for name in ("origin", "access-control-request-method"))
        return error_response(
            Forbidden(f"Pages of {shown(origin)} may not send {shown(method)} here.", code="cors_refused")
        )
