"""Liveness, readiness and metrics, without an API key (metrics: unless `metrics_closed`)."""

import asyncio

from anyio.to_thread import run_sync
from fastapi import APIRouter, Request, Response
from fastapi.responses import PlainTextResponse
from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4
from redis.exceptions import RedisError

from server import __version__
from server.api.http.dependencies import OPERATOR, Deps, authenticate, bearer
from server.api.http.error_responses import json_response
from server.api.services import Services
from server.errors import Unauthenticated
from server.tenancy.keys import same_secret

router = APIRouter()

STORE_SECONDS = 1.0
HUNG_AFTER_TIMEOUTS = 2.0  # in units of request_seconds


@router.get("/healthz")
async def healthz(deps: Deps) -> Response:
    """200 while this process answers, whatever the state of the others: restarting all would not help.

    503 when the engine has been silent for so long that `serve` must have failed to restart it:
    HUNG_AFTER_TIMEOUTS times the longest time of a request, so that no row can be waiting for it.
    """
    silence = deps.engine.silent_seconds
    if silence > HUNG_AFTER_TIMEOUTS * deps.settings.request_seconds:
        return json_response({"status": "hangs", "engine": {"silent_seconds": round(silence, 1)}}, 503)
    return json_response({"status": "ok"})


@router.get("/health", response_class=Response)
@router.get("/ping", response_class=Response)
@router.post("/ping", response_class=Response)
async def health(deps: Deps) -> Response:
    """vLLM's: 200 with an empty body while the engine answers, else 503."""
    return Response(status_code=200 if deps.engine.responsive else 503)


@router.get("/version")
async def version() -> Response:
    return json_response({"version": __version__})


@router.get("/readyz")
async def readyz(deps: Deps) -> Response:
    """200 when a request would be served now, else 503 with the failed checks.

    With a silent engine it is not ready, so that a load balancer prefers other servers; requests that
    still come are accepted, and wait for the engine until their deadlines.
    """
    checks = {
        "accepting": not deps.draining,
        "engine": deps.engine.responsive,
        "control_store": await _store_answers(deps),
    }
    ready = all(checks.values())
    # object_store is for information: adapters on the device, in RAM and on disk are served without it
    body = {
        "status": "ready" if ready else "not ready",
        "checks": checks,
        "object_store": {"breaker": deps.objects.breaker.state},
        "engine": {"silent_seconds": round(deps.engine.silent_seconds, 1)},  # how long requests wait already
    }
    return json_response(body, 200 if ready else 503, {} if ready else {"Retry-After": "1"})


@router.get("/metrics", response_class=PlainTextResponse, responses={401: {}})
async def metrics(request: Request, deps: Deps) -> Response:
    """Prometheus metrics. Open, unless they show tenants' data or the operator has closed them."""
    if deps.settings.metrics_closed:
        await _check_reader(request, deps)
    await deps.cluster_metrics.refresh()
    page = await run_sync(deps.metrics.render)  # takes milliseconds, which would delay streams
    return Response(page, media_type=CONTENT_TYPE_PLAIN_0_0_4)


async def _check_reader(request: Request, deps: Services) -> None:
    """Raise Unauthenticated unless it carries the metrics token or a key of the operator's that reads."""
    token = deps.settings.metrics_token
    if token and same_secret(bearer(request), token):
        return
    caller = await authenticate(request, deps)
    if caller.tenant is not OPERATOR or "read" not in caller.key.scopes:
        raise Unauthenticated("Metrics take the operator's key or the metrics token.")


async def _store_answers(deps: Services) -> bool:
    try:
        async with asyncio.timeout(STORE_SECONDS):
            await deps.redis.ping()
    except (RedisError, TimeoutError):
        return False
    return True
