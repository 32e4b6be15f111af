"""Requests and tokens a minute, requests at once: one call of Valkey decides for all processes and servers.

A request takes one request and all tokens it may use, and gives back what it did not use when it ends. While
it runs it holds a lease, which its process renews: one that is killed leaves nothing for long. If Valkey does
not decide in time, the same limits hold for this process alone (local_rates.py). Knows no HTTP.

pp:rates:{tenant}           hash         see rate_limits_lua.py
pp:rates:{tenant}:leases    sorted set
"""

import asyncio
import logging
import time
from typing import NamedTuple

from redis.asyncio import Redis

from adapters_store.valkey import store_errors, text
from server.errors import StoreError
from server.tenancy.limits import Limits
from server.tenancy.local_rates import FULL_SECONDS, MAX_BUCKETS, LocalRates, Verdict
from server.tenancy.rate_limits_lua import ADMIT, RENEW, SETTLE

log = logging.getLogger(__name__)
LEASE_SECONDS = 30.0
DECISION_SECONDS = 1.0  # for Valkey to answer in
SETTLE_SECONDS = 0.5  # how long the end of a request waits for it
MICRO = 1_000_000


class _Refused(NamedTuple):
    """The last refusal of a tenant for want of requests."""

    limits: Limits
    verdict: Verdict
    at: float  # time.monotonic()


class RateLimits:
    def __init__(
        self,
        redis: Redis,
        lease_seconds: float = LEASE_SECONDS,
        decision_seconds: float = DECISION_SECONDS,
    ) -> None:
        self._admit = redis.register_script(ADMIT)
        self._settle = redis.register_script(SETTLE)
        self._renew = redis.register_script(RENEW)
        self._lease = lease_seconds
        self._decision_seconds = decision_seconds
        self._local = LocalRates()
        self._running: dict[str, str] = {}  # request id -> tenant
        self._taken_locally: set[str] = set()  # of those that run
        self._refused: dict[str, _Refused] = {}  # by tenant
        self._settling: set[asyncio.Task[None]] = set()

    async def admit(self, tenant: str, limits: Limits, request: str, tokens: int) -> Verdict:
        """Whether `request` (its id) may run with so many tokens. If so, end it with `settle`. Raises nothing
        but a cancellation, after which the request holds nothing.
        """
        self._running[request] = tenant
        try:
            verdict = await self._decide(tenant, limits, request, tokens)
        except BaseException:
            self._start_settling(request, tokens)
            raise
        if verdict is None:
            verdict = self._decide_alone(tenant, limits, request, tokens)
            if verdict.refused is not None:  # Valkey may have admitted it
                self._start_settling(request, tokens)
        elif verdict.refused is not None:
            del self._running[request]
        return verdict

    async def count(self, tenant: str, limits: Limits) -> Verdict:
        """Take one request, if there is one: for a request that fails before it could run."""
        verdict = await self._decide(tenant, limits, "", 0)
        return self._local.admit(tenant, limits, 0, 0) if verdict is None else verdict

    def known_refusal(self, tenant: str, limits: Limits) -> Verdict | None:
        """The refusal that Valkey would give now, if that is known: requests come back with time alone."""
        last = self._refused.get(tenant)
        if last is None or last.limits != limits:
            return None
        elapsed, verdict = time.monotonic() - last.at, last.verdict
        if elapsed >= verdict.wait:
            del self._refused[tenant]
            return None
        requests = verdict.requests + elapsed * (limits.requests_per_minute or 0) / FULL_SECONDS
        return verdict._replace(requests=requests, wait=verdict.wait - elapsed)

    async def settle(self, request: str, unused: int) -> None:
        """End a request that was admitted: its lease ends, and `unused` tokens go back. Waits for Valkey a
        moment only; it is told in any case, once it answers.
        """
        await asyncio.wait({self._start_settling(request, unused)}, timeout=SETTLE_SECONDS)

    async def renew_leases(self) -> None:
        """Keep the leases of running requests, for ever. Run one a process."""
        while True:
            await asyncio.sleep(self._lease / 3)
            try:
                await self._renew_all()
            except StoreError as error:
                log.warning("Leases of running requests could not be renewed: %s", error.message)

    async def close(self) -> None:
        """Wait for requests that are being settled, a moment."""
        if self._settling:
            await asyncio.wait(self._settling, timeout=SETTLE_SECONDS)

    async def _decide(self, tenant: str, limits: Limits, request: str, tokens: int) -> Verdict | None:
        """Valkey's verdict; None if there is none in time. It may have admitted the request all the same."""
        arguments: list[str | int] = [
            request,
            tokens,
            int(self._lease * MICRO),
            int(FULL_SECONDS * MICRO),
            limits.requests_per_minute or 0,
            limits.tokens_per_minute or 0,
            limits.concurrent_requests or 0,
        ]
        try:
            with store_errors():
                async with asyncio.timeout(self._decision_seconds):
                    answer = await self._admit(keys=_keys(tenant), args=arguments)
        except (StoreError, TimeoutError):
            log.warning("Valkey does not decide on rate limits; they hold in this process alone")
            return None
        refused, requests, left, at_once, wait = answer
        refusal = text(refused) or None
        verdict = Verdict(refusal, float(requests), float(left), at_once, wait / MICRO)  # type: ignore[arg-type]
        if refusal == "requests":
            self._remember(tenant, _Refused(limits, verdict, time.monotonic()))
        return verdict

    def _decide_alone(self, tenant: str, limits: Limits, request: str, tokens: int) -> Verdict:
        running = sum(other == tenant for other in self._running.values()) - 1
        verdict = self._local.admit(tenant, limits, tokens, running)
        if verdict.refused is None:
            self._taken_locally.add(request)
        return verdict

    def _remember(self, tenant: str, refused: _Refused) -> None:
        if len(self._refused) > MAX_BUCKETS:
            late = time.monotonic() - FULL_SECONDS
            self._refused = {key: last for key, last in self._refused.items() if last.at > late}
        self._refused[tenant] = refused

    def _start_settling(self, request: str, unused: int) -> asyncio.Task[None]:
        tenant = self._running.pop(request)
        if request in self._taken_locally:
            self._taken_locally.remove(request)
            self._local.give_back(tenant, unused)
        task = asyncio.create_task(self._give_back(tenant, request, unused))
        self._settling.add(task)
        task.add_done_callback(self._settling.discard)
        return task

    async def _give_back(self, tenant: str, request: str, unused: int) -> None:
        try:
            with store_errors():
                await self._settle(keys=_keys(tenant), args=[request, unused])
        except StoreError:  # the lease ends by itself, and the bucket is full within a minute
            log.warning(
                "Valkey does not answer: %d tokens of a request that ended are not given back", unused
            )

    async def _renew_all(self) -> None:
        if not self._running:
            return
        leases = [_keys(tenant)[1] for tenant in self._running.values()]
        with store_errors():
            await self._renew(keys=leases, args=[int(self._lease * MICRO), *self._running])


def _keys(tenant: str) -> list[str]:
    return [f"pp:rates:{tenant}", f"pp:rates:{tenant}:leases"]
