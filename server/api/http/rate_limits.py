"""A generation request against the limits of its tenant: the decision, and OpenAI's headers and sentences.

A tenant without such limits pays nothing: neither a call of Valkey nor a header.
"""

import math
from collections.abc import AsyncIterator
from typing import NamedTuple

from fastapi import Request

from server.api.http.dependencies import CurrentTenant, services_of
from server.api.services import Services
from server.errors import PolypeftError, RateLimited, shown
from server.tenancy.limits import Limits
from server.tenancy.local_rates import FULL_SECONDS, Verdict
from server.tenancy.tenants import Tenant

CONCURRENT_WAIT = 1.0  # seconds; nobody knows when a running request ends


class _Measure(NamedTuple):
    """How OpenAI speaks of a limit."""

    type: str
    unit: str


_MEASURES = {
    "requests": _Measure("requests", "requests per min (RPM)"),
    "tokens": _Measure("tokens", "tokens per min (TPM)"),
    "size": _Measure("tokens", "tokens per min (TPM)"),
    "concurrent": _Measure("requests", "concurrent requests"),
}


class RateLimitedRequest:
    """One request of a tenant with limits. `headers` are those of its answer, whatever that is."""

    def __init__(self, deps: Services, tenant: Tenant, limits: Limits) -> None:
        self.headers: list[tuple[bytes, bytes]] = []
        self._deps = deps
        self._tenant = tenant
        self._limits = limits
        self._decided = False

    async def admit(self, request: str, model: str, tokens: int) -> None:
        """Take what it needs, or raise RateLimited. `request` is its id; then it must be settled."""
        self._decided = True
        verdict = await self._deps.rate_limits.admit(self._tenant.id, self._limits, request, tokens)
        self._tell(verdict, tokens, f" for {shown(model)[1:-1]}")

    async def settle(self, request: str, unused: int) -> None:
        """End a request that was admitted, giving back the tokens it did not use."""
        await self._deps.rate_limits.settle(request, unused)

    def refuse_at_once(self) -> None:
        """Raise RateLimited before any work, if the last refusal still holds."""
        if verdict := self._deps.rate_limits.known_refusal(self._tenant.id, self._limits):
            self._decided = True
            self._tell(verdict, 0, "")

    async def count_failure(self) -> None:
        """A request that failed before it was decided on is one of the minute's. Raises RateLimited."""
        if not self._decided and self._limits.requests_per_minute is not None:
            self._decided = True
            self._tell(await self._deps.rate_limits.count(self._tenant.id, self._limits), 0, "")

    def _tell(self, verdict: Verdict, tokens: int, model: str) -> None:
        self.headers = rate_limit_headers(self._limits, verdict)
        if verdict.refused is not None:
            self._deps.metrics.count("rate_limited", verdict.refused)
            raise refusal(f"{model} in organization {self._tenant.id}", self._limits, verdict, tokens)


async def rate_limited(request: Request, tenant: CurrentTenant) -> AsyncIterator[RateLimitedRequest | None]:
    """A dependency of generation routes, ahead of the body. None for a tenant without such limits."""
    limits: Limits = request.state.limits
    rates = RateLimitedRequest(services_of(request), tenant, limits) if limits.limits_rates else None
    request.state.rates = rates  # for build_generation, and for the headers that RequestMiddleware adds
    if rates is not None:
        rates.refuse_at_once()
    try:
        yield rates
    except PolypeftError as error:
        if rates is not None and error.status < 500:
            await rates.count_failure()
        raise


def rate_limit_headers(limits: Limits, verdict: Verdict) -> list[tuple[bytes, bytes]]:
    """OpenAI's x-ratelimit-*. `reset` is the time until a bucket is full; of those limits that there are."""
    headers = []
    buckets = (
        ("requests", limits.requests_per_minute, verdict.requests),
        ("tokens", limits.tokens_per_minute, verdict.tokens),
    )
    for name, limit, left in buckets:
        if limit is None:
            continue
        reset = (limit - left) * FULL_SECONDS / limit
        for what, value in (("limit", limit), ("remaining", math.floor(left)), ("reset", duration(reset))):
            headers.append((f"x-ratelimit-{what}-{name}".encode(), str(value).encode()))
    return headers


def refusal(whose: str, limits: Limits, verdict: Verdict, tokens: int) -> RateLimited:
    """The 429 in OpenAI's words. `whose` names model and tenant."""
    kind = verdict.refused or "requests"
    measure = _MEASURES[kind]
    limit, left, requested = {
        "requests": (limits.requests_per_minute, verdict.requests, 1),
        "tokens": (limits.tokens_per_minute, verdict.tokens, tokens),
        "size": (limits.tokens_per_minute, verdict.tokens, tokens),
        "concurrent": (limits.concurrent_requests, 0.0, 1),
    }[kind]
    limit = limit or 0
    if kind == "size":
        message = (
            f"Request too large{whose} on {measure.unit}: Limit {limit}, Requested {requested}. "
            "The input or output tokens must be reduced in order to run successfully."
        )
        return RateLimited(message, kind=measure.type, wait=None)
    count = verdict.running if kind == "concurrent" else math.ceil(limit - left)
    wait = CONCURRENT_WAIT if kind == "concurrent" else verdict.wait
    message = (
        f"Rate limit reached{whose} on {measure.unit}: Limit {limit}, Used {count}, Requested {requested}. "
        f"Please try again in {duration(wait)}."
    )
    return RateLimited(message, kind=measure.type, wait=wait)


def duration(seconds: float) -> str:
    """As Go writes it, in whole milliseconds, rounded up: 12ms, 1.5s, 6m0s."""
    milliseconds = math.ceil(max(0.0, seconds) * 1000)
    if 0 < milliseconds < 1000:
        return f"{milliseconds}ms"
    minutes, rest = divmod(milliseconds, 60_000)
    return (f"{minutes}m" if minutes else "") + f"{rest / 1000:g}s"
