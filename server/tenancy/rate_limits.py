"""Requests and tokens a minute, requests at once: one call of Valkey decides for all processes and servers.

A request takes one request and all tokens it may use, of its tenant, its key and its adapters, and gives back
what it did not use when it ends. While it runs it holds a lease, which its process renews: one that is killed
leaves nothing for long. If Valkey does not decide in time, the process decides by its share of the limits
(local_rates.py), and what it admitted is paid once Valkey answers. Knows no HTTP.

pp:rates:{allowance}            hash         see rate_limits_lua.py
pp:rates:{allowance}:leases     sorted set
pp:rates:{allowance}:waiting    hash
pp:deciders                 sorted set   processes that decide, by the time at which they count no longer
pp:paid:{payment}           string       a payment that was made; expires
"""

import asyncio
import logging
import time
import uuid
from collections.abc import Coroutine
from typing import Any, NamedTuple

from redis.asyncio import Redis

from adapters_store.outage import ANSWER_SECONDS, Outage
from adapters_store.shared_connection import SharedConnection
from adapters_store.valkey import store_errors, text
from server.errors import StoreError
from server.tenancy.debts import Debts
from server.tenancy.limits import Allowance, RequestLimits
from server.tenancy.local_rates import FULL_SECONDS, MAX_BUCKETS, LocalRates
from server.tenancy.rate_limits_lua import ADMIT, BEGIN, PAY, RENEW, SETTLE
from server.tenancy.verdict import Left, Refusal, Verdict, verdict_of

log = logging.getLogger(__name__)
LEASE_SECONDS = 30.0
SETTLE_SECONDS = 0.5  # how long the end of a request waits for Valkey
MICRO = 1_000_000
PROCESSES = "pp:deciders"


class _Running(NamedTuple):
    """A request that runs, or is being decided on."""

    allowances: list[Allowance]
    tokens: int
    local: bool = False  # admitted by this process alone
    waits: bool = True  # for its first token


class _Refused(NamedTuple):
    """The last refusal of a allowance for want of requests."""

    limits: RequestLimits
    verdict: Verdict
    at: float  # time.monotonic()


class RateLimits:
    """`processes`: how many decide, as far as is known before Valkey has said."""

    def __init__(
        self,
        redis: Redis,
        lease_seconds: float = LEASE_SECONDS,
        decision_seconds: float = ANSWER_SECONDS,
        *,
        outage: Outage | None = None,
        processes: int = 1,
    ) -> None:
        self._admit, self._settle, self._begin, self._renew, self._pay = (
            redis.register_script(script) for script in (ADMIT, SETTLE, BEGIN, RENEW, PAY)
        )
        self._connection = SharedConnection(redis)
        self._lease = lease_seconds
        self._outage = outage or Outage(decision_seconds)
        self._local = LocalRates()
        self._local.processes = processes
        self._debts = Debts()
        self._process = uuid.uuid4().hex
        self._running: dict[str, _Running] = {}  # by request id
        self._refused: dict[str, _Refused] = {}  # by allowance
        self._tasks: set[asyncio.Task[None]] = set()

    async def admit(self, allowances: list[Allowance], request: str, tokens: int) -> Verdict:
        """Whether `request` (its id) may run with so many tokens: the tightest of all limits holds, the
        tenant's first. If it may, end it with `settle`. Raises nothing but a cancellation, after which the
        request holds nothing.
        """
        self._running[request] = _Running(allowances, tokens)
        try:
            verdict = await self._decide(allowances, request, tokens)
        except BaseException:
            self._end(request, tokens, taken=False)
            raise
        if verdict is None:
            verdict = self._decide_alone(allowances, request, tokens)
        elif verdict.refused is not None:
            del self._running[request]
        return verdict

    async def count(self, allowances: list[Allowance]) -> Verdict:
        """Take one request, if there is one: for a request that fails before it could run."""
        verdict = await self._decide(allowances, "", 0)
        if verdict is None:
            verdict = self._local.admit(allowances, 0, [0] * len(allowances))
            if verdict.refused is None:
                self._debts.add(allowances, 0)
        return verdict

    def known_refusal(self, allowances: list[Allowance]) -> Verdict | None:
        """The refusal that Valkey would give now, if that is known: requests come back with time alone."""
        for allowance in allowances:
            last = self._refused.get(allowance.id)
            if last is None or last.limits != allowance.limits:
                continue
            elapsed, verdict = time.monotonic() - last.at, last.verdict
            if elapsed >= verdict.wait:
                del self._refused[allowance.id]
                continue
            requests = verdict.requests + elapsed * (allowance.limits.requests_per_minute or 0) / FULL_SECONDS
            return verdict._replace(requests=requests, wait=verdict.wait - elapsed)
        return None

    def begin(self, request: str) -> None:
        """The request has its first token: it waits no more."""
        running = self._running.get(request)
        if running is not None and running.waits and running.allowances[0].limits.queued is not None:
            self._running[request] = running._replace(waits=False)
            self._start(self._send(self._begin(keys=_keys(running.allowances)[-1:], args=[request])))

    async def settle(self, request: str, unused: int) -> None:
        """End a request that was admitted: its leases end, and `unused` tokens go back. Waits for Valkey a
        moment only; it is told in any case, once it answers.
        """
        await asyncio.wait({self._end(request, unused)}, timeout=SETTLE_SECONDS)

    async def renew_leases(self) -> None:
        """Keep the leases of running requests, and pay debts, for ever. Run one a process."""
        while True:
            try:
                await self._renew_all()
                await self._pay_debts()
            except StoreError as error:
                log.warning("Leases of running requests could not be renewed: %s", error.message)
            await asyncio.sleep(self._lease / 3)

    async def close(self) -> None:
        """Wait for requests that are being settled, a moment."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=SETTLE_SECONDS)
        await self._connection.close()

    async def _decide(self, allowances: list[Allowance], request: str, tokens: int) -> Verdict | None:
        """Valkey's verdict; None if there is none in time. It may have admitted the request all the same."""
        arguments: list[str | int] = [
            request,
            tokens,
            int(self._lease * MICRO),
            int(FULL_SECONDS * MICRO),
            allowances[0].limits.queued or 0,
        ]
        for allowance in allowances:
            limits = allowance.limits
            arguments += (
                limits.requests_per_minute or 0,
                limits.tokens_per_minute or 0,
                limits.concurrent_requests or 0,
            )

        async def call() -> Any:
            with store_errors():
                return await self._connection.run(self._admit, _keys(allowances), arguments)

        try:
            refused, by, wait, waiting, *numbers = await self._outage.ask(call)
        except StoreError:
            log.warning("Valkey does not decide on rate limits; this process does, by its share of them")
            return None
        left = [Left(float(r), float(t), n) for r, t, n in zip(*[iter(numbers)] * 3, strict=True)]
        refusal: Refusal | None = text(refused) or None  # type: ignore[assignment]  # a word of the script's
        verdict = verdict_of(allowances, left, refusal, max(0, by - 1), wait / MICRO, waiting)
        for allowance, of_allowance in zip(allowances, left, strict=True):
            self._local.learn(allowance, of_allowance)
        if refusal == "requests":
            self._remember(allowances[by - 1], verdict)
        if self._debts:
            self._start(self._send(self._pay_debts()))
        return verdict

    def _decide_alone(self, allowances: list[Allowance], request: str, tokens: int) -> Verdict:
        others = [other for id_, other in self._running.items() if id_ != request]
        running = [
            sum(allowance.id == own.id for o in others for own in o.allowances) for allowance in allowances
        ]
        waiting = sum(o.tokens for o in others if o.waits and o.allowances[0].id == allowances[0].id)
        verdict = self._local.admit(allowances, tokens, running, waiting)
        if verdict.refused is None:
            self._running[request] = _Running(allowances, tokens, local=True)
        else:
            self._end(request, tokens, taken=False)
        return verdict

    def _remember(self, allowance: Allowance, verdict: Verdict) -> None:
        if len(self._refused) > MAX_BUCKETS:
            late = time.monotonic() - FULL_SECONDS
            self._refused = {key: last for key, last in self._refused.items() if last.at > late}
        self._refused[allowance.id] = _Refused(allowance.limits, verdict, time.monotonic())

    def _end(self, request: str, unused: int, *, taken: bool = True) -> asyncio.Task[None]:
        """Start to end the request. What it took here alone becomes a debt; what Valkey may have taken as
        well, its answer being lost, goes back whole.
        """
        running = self._running.pop(request)
        requests = 0
        if running.local:
            self._local.give_back(running.allowances, unused)
            self._debts.add(running.allowances, running.tokens - unused)
        if running.local or not taken:
            requests, unused = 1, running.tokens
        arguments: list[str | int] = [request, unused, requests, running.allowances[0].limits.queued or 0]
        return self._start(self._send(self._settle(keys=_keys(running.allowances), args=arguments)))

    def _start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _send(self, call: Any) -> None:
        """Tell Valkey. If it cannot be told, leases end by themselves, and buckets are full in a minute."""
        try:
            with store_errors():
                await call
        except StoreError as error:
            log.warning("Valkey was not told of a request's course: %s", error.message)

    async def _renew_all(self) -> None:
        keys, waiting = [PROCESSES], set[str]()
        ids: list[str] = []
        for request, running in self._running.items():
            leases = _keys(running.allowances)
            if running.allowances[0].limits.queued is not None:
                waiting.add(leases.pop())
            keys += leases[1::2]
            ids += [request] * len(running.allowances)
        arguments: list[str | int] = [int(self._lease * MICRO), self._process, *ids]
        with store_errors():
            self._local.processes = int(await self._renew(keys=[*keys, *waiting], args=arguments))

    async def _pay_debts(self) -> None:
        """Tell Valkey what was used without it. Raises StoreError; then the same payment is made later."""
        while payment := self._debts.payment():
            keys = [f"pp:paid:{payment.id}", *(f"pp:rates:{debt.allowance.id}" for debt in payment.debts)]
            arguments = [int(FULL_SECONDS * MICRO)]
            for allowance, requests, tokens in payment.debts:
                limits = allowance.limits
                arguments += [requests, tokens]
                arguments += [limits.requests_per_minute or 0, limits.tokens_per_minute or 0]
            with store_errors():
                await self._pay(keys=keys, args=arguments)
            self._debts.paid(payment)


def _keys(allowances: list[Allowance]) -> list[str]:
    keys = []
    for allowance in allowances:
        bucket = f"pp:rates:{allowance.id}"
        keys += [bucket, f"{bucket}:leases"]
    if allowances[0].limits.queued is not None:
        keys.append(f"pp:rates:{allowances[0].id}:waiting")
    return keys
