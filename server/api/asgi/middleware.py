"""Middleware of every request: its id, metrics and trace, and the answer to an unknown exception."""

import logging
import time
import uuid

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api.http.audited import end_change
from server.api.http.error_responses import error_response
from server.errors import PolypeftError, QuotaExceeded
from server.logs import request_id
from server.metrics import Metrics
from server.tenancy.tenants import OPERATOR, Tenant
from server.tracing import Tracing, use_trace

log = logging.getLogger(__name__)

CLIENT_GONE_STATUS = 499  # in metrics only: the client left before it was answered


class RequestMiddleware:
    """ASGI middleware. It generates the request id; a client's X-Request-Id is neither used nor repeated."""

    def __init__(self, app: ASGIApp, metrics: Metrics, tracing: Tracing | None = None) -> None:
        self._app = app
        self._metrics = metrics
        self._tracing = tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        id_ = f"req_{uuid.uuid4().hex}"
        request_id.set(id_)
        state = scope.setdefault("state", {})
        state["request_id"] = id_
        trace = self._tracing.begin(scope["method"], scope["headers"], id_) if self._tracing else None
        use_trace(trace)
        extra_headers = [(b"x-request-id", id_.encode())]
        if trace is not None:
            extra_headers.append((b"traceparent", trace.traceparent.encode()))
        status, start = 0, time.perf_counter()

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                await end_change(state, status)
                rates = state.get("rates")
                message["headers"] = [*message["headers"], *extra_headers, *(rates.headers if rates else ())]
            elif trace is not None:
                trace.sent(more=message.get("more_body", False))
            await send(message)

        self._metrics.opened(1)
        try:
            await self._app(scope, receive, send_with_id)
        except ClientDisconnect:
            status = CLIENT_GONE_STATUS
        except Exception:
            log.exception("Request %s failed", id_)
            if status == 0:
                failure = PolypeftError("The server failed on this request; its id is in x-request-id.")
                await error_response(failure)(scope, receive, send_with_id)
        finally:
            await end_change(state, status)  # of a client that left before it was answered
            route = getattr(
                scope.get("route"), "path", "other"
            )  # the template, so that no caller's text becomes a label
            self._metrics.opened(-1)
            self._metrics.count("http_requests", route, str(status), tenant_class(state.get("tenant")))
            if status == QuotaExceeded.status:
                self._metrics.count("rejections", "quota")
            self._metrics.observe("http_seconds", time.perf_counter() - start, route)
            if trace is not None:
                trace.end(scope["method"], route, status)


def tenant_class(tenant: Tenant | None) -> str:
    """The value of the metrics' tenant label: by kind and weight, never an id."""
    if tenant is None:
        return "anonymous"
    if tenant.id == OPERATOR.id:
        return "operator"
    return "standard" if tenant.weight == 1 else "low" if tenant.weight < 1 else "high"
