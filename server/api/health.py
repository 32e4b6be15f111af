"""What needs no key: alive, ready, and the metrics while they hold nothing that a tenant chose."""

import asyncio

from anyio.to_thread import run_sync
from fastapi import APIRouter, Request, Response
from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4
from redis.exceptions import RedisError

from server.api.deps import Parts, bearer
from server.api.errors import json_response
from server.api.services import Services
from server.errors import Unauthenticated
from server.tenancy.keys import same_secret

router = APIRouter()

STORE_SECONDS = 1.0


@router.get("/healthz")
async def healthz() -> Response:
    """This process answers. Says nothing of the others."""
    return json_response({"status": "ok"})


@router.get("/readyz")
async def readyz(parts: Parts) -> Response:
    """200 when a request would be served now; 503 and what is missing otherwise."""
    checks = {
        "accepting": not parts.draining,
        "engine": parts.engine.ready,
        "control_store": await _store_answers(parts),
    }
    ready = all(checks.values())
    # for information: adapters on the device, in RAM and on disk are served without the store
    body = {
        "status": "ready" if ready else "not ready",
        "checks": checks,
        "object_store": {"breaker": parts.objects.breaker.state},
    }
    return json_response(body, 200 if ready else 503, {} if ready else {"Retry-After": "1"})


@router.get("/metrics")
async def metrics(request: Request, parts: Parts) -> Response:
    """Open, unless it names somebody or the operator has closed it."""
    if parts.settings.metrics_closed:
        _check_reader(bearer(request), parts)
    await parts.system_figures.refresh()
    page = await run_sync(parts.metrics.render)  # some milliseconds, which no stream shall wait
    return Response(page, media_type=CONTENT_TYPE_PLAIN_0_0_4)


def _check_reader(secret: str, parts: Services) -> None:
    """Raises Unauthenticated."""
    token = parts.settings.metrics_token
    known = [parts.operator_secret] + ([token] if token else [])
    if not any(same_secret(secret, each) for each in known):
        raise Unauthenticated("Metrics take the operator's key or the metrics token.")


async def _store_answers(parts: Services) -> bool:
    try:
        async with asyncio.timeout(STORE_SECONDS):
            await parts.redis.ping()
    except (RedisError, TimeoutError):
        return False
    return True
