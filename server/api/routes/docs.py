"""GET /openapi.json and /docs: what this server answers, without a key. Off by `--no-docs`."""

from functools import cached_property
from typing import Any

from anyio.to_thread import run_sync
from fastapi import APIRouter, Response
from starlette.responses import HTMLResponse

from server.api.http.error_responses import json_response
from server.api.schema.openapi import openapi
from server.api.schema.page import POLICY, page


class Docs:
    """Both, of these routers; made at the first request, on a thread: it takes a good part of a second."""

    def __init__(self, routers: list[APIRouter]) -> None:
        self._routers = routers
        self.router = APIRouter(include_in_schema=False)
        self.router.add_api_route("/openapi.json", self._json, response_class=Response)
        self.router.add_api_route("/docs", self._html, response_class=Response)

    @cached_property
    def document(self) -> dict[str, Any]:
        return openapi(self._routers)

    @cached_property
    def _page(self) -> str:
        return page(self.document)

    async def _json(self) -> Response:
        return json_response(await run_sync(lambda: self.document))

    async def _html(self) -> Response:
        return HTMLResponse(await run_sync(lambda: self._page), headers={"content-security-policy": POLICY})
