"""A generation request against the limits of its tenant, key and adapters: OpenAI's headers and sentences.

Where nothing is limited it pays nothing: neither a call of Valkey nor a header.
"""

import math
from collections.abc import AsyncIterator
from typing import NamedTuple

from fastapi import Request

from server.api.http.dependencies import CurrentCaller, Deps
from server.api.services import Services
from server.errors import PolypeftError, RateLimited, shown
from server.tenancy.limits import Allowance, tightest
from server.tenancy.local_rates import FULL_SECONDS
from server.tenancy.tenants import Tenant
from server.tenancy.verdict import Verdict

UNKNOWN_WAIT = 1.0  # seconds; nobody knows when a running request ends, or a waiting one begins


class _Measure(NamedTuple):
    """How OpenAI speaks of a limit."""

    type: str
    unit: str


_MEASURES = {
    "requests": _Measure("requests", "requests per min (RPM)"),
    "tokens": _Measure("tokens", "tokens per min (TPM)"),
    "size": _Measure("tokens", "tokens per min (TPM)"),
    "concurrent": _Measure("requests", "concurrent requests"),
    "queued": _Measure("tokens", "queued tokens"),
}


class RateLimitedRequest:
    """One request of a tenant with limits. `headers` are those of its answer, whatever that is.

    `allowances`: the tenant, and whatever else is limited; `for_adapters` adds those that the body names.
    """

    def __init__(self, deps: Services, tenant: Tenant, allowances: list[Allowance]) -> None:
        self.headers: list[tuple[bytes, bytes]] = []
        self.allowances = allowances
        self._deps = deps
        self._tenant = tenant
        self._decided = False

    @property
    def counts(self) -> bool:
        """Whether anything of the request has to be counted."""
        return any(allowance.limits.limits_rates for allowance in self.allowances)

    async def for_adapters(self, names: list[str]) -> None:
        """The request uses these adapters: their limits hold, too."""
        if names:
            self.allowances = [*self.allowances, *await self._deps.limits.of_adapters(self._tenant.id, names)]

    async def admit(self, request: str, model: str, tokens: int) -> None:
        """Take what it needs, or raise RateLimited. `request` is its id; then it must be settled."""
        self._decided = True
        verdict = await self._deps.rate_limits.admit(self.allowances, request, tokens)
        self._tell(verdict, tokens, f" for {shown(model)[1:-1]}")

    def begin(self, request: str) -> None:
        """A request that was admitted has its first token."""
        self._deps.rate_limits.begin(request)

    async def settle(self, request: str, unused: int) -> None:
        """End a request that was admitted, giving back the tokens it did not use."""
        await self._deps.rate_limits.settle(request, unused)

    def refuse_at_once(self) -> None:
        """Raise RateLimited before any work, if the last refusal still holds."""
        if verdict := self._deps.rate_limits.known_refusal(self.allowances):
            self._decided = True
            self._tell(verdict, 0, "")

    async def count_failure(self) -> None:
        """A request that failed before it was decided on is one of the minute's. Raises RateLimited."""
        if not self._decided and tightest(self.allowances, "requests_per_minute") is not None:
            self._decided = True
            self._tell(await self._deps.rate_limits.count(self.allowances), 0, "")

    def _tell(self, verdict: Verdict, tokens: int, model: str) -> None:
        self.headers = rate_limit_headers(verdict)
        if verdict.refused is not None:
            self._deps.metrics.count("rate_limited", verdict.refused)
            raise refusal(f"{model} in organization {self._tenant.id}{verdict.whose}", verdict, tokens)


async def rate_limited(
    request: Request, deps: Deps, caller: CurrentCaller
) -> AsyncIterator[RateLimitedRequest | None]:
    """A dependency of generation routes, ahead of the body. None where no limit can hold."""
    allowances = caller.allowances
    limited = caller.adapters_limited or any(allowance.limits.limits_rates for allowance in allowances)
    rates = RateLimitedRequest(deps, caller.tenant, allowances) if limited else None
    request.state.rates = rates  # for build_generation, and for the headers that RequestMiddleware adds
    if rates is not None:
        rates.refuse_at_once()
    try:
        yield rates
    except PolypeftError as error:
        if rates is not None and error.status < 500:
            await rates.count_failure()
        raise


def rate_limit_headers(verdict: Verdict) -> list[tuple[bytes, bytes]]:
    """OpenAI's x-ratelimit-*. `reset` is the time until a bucket is full; of those limits that there are."""
    headers, limits = [], verdict.limits
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


def refusal(whose: str, verdict: Verdict, tokens: int) -> RateLimited:
    """The 429 in OpenAI's words. `whose` names model and tenant."""
    kind, limits = verdict.refused or "requests", verdict.limits
    measure = _MEASURES[kind]
    limit, used, requested = {
        "requests": (limits.requests_per_minute, None, 1),
        "tokens": (limits.tokens_per_minute, None, tokens),
        "size": (limits.tokens_per_minute, None, tokens),
        "concurrent": (limits.concurrent_requests, verdict.running, 1),
        "queued": (limits.queued, verdict.waiting, tokens),
    }[kind]
    limit, left = limit or 0, verdict.tokens if kind == "tokens" else verdict.requests
    if kind == "size":
        message = (
            f"Request too large{whose} on {measure.unit}: Limit {limit}, Requested {requested}. "
            "The input or output tokens must be reduced in order to run successfully."
        )
        return RateLimited(message, kind=measure.type, wait=None)
    wait = verdict.wait if used is None else UNKNOWN_WAIT
    used = math.ceil(limit - left) if used is None else used
    message = (
        f"Rate limit reached{whose} on {measure.unit}: Limit {limit}, Used {used}, Requested {requested}. "
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
