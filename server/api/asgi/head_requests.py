"""HEAD wherever GET is: the same headers, without the body."""

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send


class HeadRequests:
    """ASGI middleware that answers HEAD by the GET route, and stops that once its headers are there."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "HEAD":
            await self._app(scope, receive, send)
            return
        started = False

        async def receive_or_leave() -> Message:
            return {"type": "http.disconnect"} if started else await receive()

        async def send_head(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                await send(message)

        inner = {**scope, "method": "GET"}
        try:
            await self._app(inner, receive_or_leave, send_head)
        except ClientDisconnect:
            if not started:
                raise
        finally:
            scope["route"] = inner.get("route")  # for the metrics
        await send({"type": "http.response.body", "body": b""})
