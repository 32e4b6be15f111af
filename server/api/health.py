"""What needs no key: alive, ready, and the metrics. Holds nothing that a tenant chose."""

import asyncio

from fastapi import APIRouter, Response
from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4
from redis.exceptions import RedisError

from server.api.deps import Parts
from server.api.errors import json_response
from server.api.services import Services

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
async def metrics(parts: Parts) -> Response:
    return Response(parts.metrics.render(), media_type=CONTENT_TYPE_PLAIN_0_0_4)


async def _store_answers(parts: Services) -> bool:
    try:
        async with asyncio.timeout(STORE_SECONDS):
            await parts.redis.ping()
    except (RedisError, TimeoutError):
        return False
    return True
