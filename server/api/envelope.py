"""Around every request: its id, its count, and an answer when a handler breaks. Knows no route."""

import logging
import uuid

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api.errors import error_response
from server.errors import PolypeftError
from server.metrics import Metrics

log = logging.getLogger(__name__)

GONE = 499  # the client left before an answer; only ever seen in metrics


class Envelope:
    """ASGI middleware. The id is always ours: a client's X-Request-Id is neither used nor repeated."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = f"req_{uuid.uuid4().hex}"
        scope.setdefault("state", {})["request_id"] = request_id
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", request_id.encode())]
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except ClientDisconnect:
            status = GONE
        except Exception:
            log.exception("Request %s failed", request_id)
            if status == 0:
                failure = PolypeftError("The server failed on this request; its id is in x-request-id.")
                await error_response(failure)(scope, receive, send_with_id)
        finally:
            route = getattr(scope.get("route"), "path", "other")  # the template: no caller's text is a label
            self._metrics.http_requests.labels(route, str(status)).inc()
