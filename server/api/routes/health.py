"""What needs no key: alive, ready, and the metrics while they hold nothing that a tenant chose."""

import asyncio

from anyio.to_thread import run_sync
from fastapi import APIRouter, Request, Response
from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4
from redis.exceptions import RedisError

from server.api.http.dependencies import Deps, bearer
from server.api.http.error_responses import json_response
from server.api.services import Services
from server.errors import Unauthenticated
from server.tenancy.keys import same_secret

router = APIRouter()

STORE_SECONDS = 1.0
HUNG = 2.0


@router.get("/healthz")
async def healthz(deps: Deps) -> Response:
    """200 while this process answers, whatever the others do: a restart of all is no cure for one of them.

    503 when the engine has said nothing for so long that `serve` must have failed to end it: for HUNG times
    the longest that a request may take, so that no row waits for it.
    """
    silence = deps.engine.silent_seconds
    if silence > HUNG * deps.settings.request_seconds:
        return json_response({"status": "hangs", "engine": {"silent_seconds": round(silence, 1)}}, 503)
    return json_response({"status": "ok"})


@router.get("/readyz")
async def readyz(deps: Deps) -> Response:
    """200 when a request would be served now; 503 and what is missing otherwise.

    A silent engine is none that serves now, so others may get what is new. What comes all the same is taken,
    and waits for the engine until its deadline.
    """
    checks = {
        "accepting": not deps.draining,
        "engine": deps.engine.responsive,
        "control_store": await _store_answers(deps),
    }
    ready = all(checks.values())
    # for information: adapters on the device, in RAM and on disk are served without the store
    body = {
        "status": "ready" if ready else "not ready",
        "checks": checks,
        "object_store": {"breaker": deps.objects.breaker.state},
        # a request sent now waits at least so long
        "engine": {"silent_seconds": round(deps.engine.silent_seconds, 1)},
    }
    return json_response(body, 200 if ready else 503, {} if ready else {"Retry-After": "1"})


@router.get("/metrics")
async def metrics(request: Request, deps: Deps) -> Response:
    """Open, unless it names somebody or the operator has closed it."""
    if deps.settings.metrics_closed:
        _check_reader(bearer(request), deps)
    await deps.cluster_metrics.refresh()
    page = await run_sync(deps.metrics.render)  # some milliseconds, which no stream shall wait
    return Response(page, media_type=CONTENT_TYPE_PLAIN_0_0_4)


def _check_reader(secret: str, deps: Services) -> None:
    """Raises Unauthenticated."""
    token = deps.settings.metrics_token
    known = [deps.operator_secret] + ([token] if token else [])
    if not any(same_secret(secret, each) for each in known):
        raise Unauthenticated("Metrics take the operator's key or the metrics token.")


async def _store_answers(deps: Services) -> bool:
    try:
        async with asyncio.timeout(STORE_SECONDS):
            await deps.redis.ping()
    except (RedisError, TimeoutError):
        return False
    return True
