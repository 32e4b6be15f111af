"""The decision on rate limits, by a real Valkey: right for several deciders at once, and all or nothing."""

import asyncio
import math
import random
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from redis import Redis as SyncRedis
from redis.asyncio import Redis

from adapters_store.valkey import connect
from server.tenancy.limits import NO_LIMITS, Allowance, Limits, RequestLimits
from server.tenancy.local_rates import FULL_SECONDS, LocalRates
from server.tenancy.rate_limits import RateLimits, _Running
from server.tenancy.rate_limits_lua import ADMIT
from server.tenancy.verdict import Verdict

pytestmark = pytest.mark.anyio
LEASE = 30_000_000
FULL = int(FULL_SECONDS * 1_000_000)
HOUR = 3_600_000_000


def of(tenant: str, limits: RequestLimits) -> list[Allowance]:
    """The limits of a tenant alone."""
    return [Allowance(tenant, limits)]


def passes(redis: SyncRedis, tenant: str, seconds: float) -> None:
    """Time goes by (or back) for the bucket: what it remembers moves the other way."""
    key = f"pp:rates:{tenant}"
    if at := redis.hget(key, "at"):
        redis.hset(key, "at", int(at) - int(seconds * 1_000_000))


async def test_a_minutes_requests_pass_and_no_more(redis: Redis) -> None:
    rates, limits = RateLimits(redis), Limits(requests_per_minute=3)
    verdicts = [await rates.admit(of("t", limits), f"r{i}", 5) for i in range(4)]
    assert [verdict.refused for verdict in verdicts] == [None, None, None, "requests"]
    assert [math.floor(verdict.requests) for verdict in verdicts] == [2, 1, 0, 0]
    assert verdicts[-1].wait == pytest.approx(20, abs=1)
    assert (await rates.admit(of("other", limits), "r", 5)).refused is None


async def test_requests_and_tokens_are_taken_together_or_not_at_all(redis: Redis) -> None:
    rates, limits = RateLimits(redis), Limits(requests_per_minute=10, tokens_per_minute=1000)
    assert (await rates.admit(of("t", limits), "a", 700)).refused is None
    refused = await rates.admit(of("t", limits), "b", 700)
    assert (refused.refused, math.floor(refused.requests)) == ("tokens", 9)
    assert refused.wait == pytest.approx(24, abs=1)  # 400 are short
    assert (await rates.admit(of("t", limits), "c", 300)).refused is None
    assert (await rates.admit(of("t", limits), "d", 1001)).refused == "size"


async def test_what_is_not_used_comes_back_once(redis: Redis) -> None:
    rates, limits = RateLimits(redis), Limits(tokens_per_minute=1000)
    await rates.admit(of("t", limits), "a", 1000)
    await rates.settle("a", 600)
    rates._running["a"] = _Running(
        of("t", limits), 1000
    )  # the end of the request is told again, as by a retry
    await rates.settle("a", 600)
    assert (await rates.admit(of("t", limits), "b", 0)).tokens == pytest.approx(600, abs=20)


async def test_a_request_that_is_sent_again_pays_once(redis: Redis) -> None:
    """redis-py repeats a command whose answer was lost."""
    rates, limits = RateLimits(redis), Limits(requests_per_minute=10, concurrent_requests=1)
    first = await rates.admit(of("t", limits), "a", 1)
    again = await rates.admit(of("t", limits), "a", 1)
    assert (again.refused, again.running) == (None, 1)
    assert again.requests == pytest.approx(first.requests, abs=0.5)


async def test_requests_at_once(redis: Redis) -> None:
    rates, limits = RateLimits(redis), Limits(concurrent_requests=2)
    elsewhere = RateLimits(redis)
    assert (await rates.admit(of("t", limits), "a", 1)).refused is None
    assert (await elsewhere.admit(of("t", limits), "b", 1)).refused is None
    assert (await elsewhere.admit(of("t", limits), "c", 1)).refused == "concurrent"
    await rates.settle("a", 0)
    assert (await elsewhere.admit(of("t", limits), "d", 1)).refused is None


async def test_a_limit_changes_at_once(redis: Redis) -> None:
    rates = RateLimits(redis)
    for i in range(2):
        assert (await rates.admit(of("t", Limits(requests_per_minute=2)), f"a{i}", 0)).refused is None
    assert (await rates.admit(of("t", Limits(requests_per_minute=2)), "b", 0)).refused == "requests"
    assert rates.known_refusal(of("t", Limits(requests_per_minute=2))) is not None
    assert rates.known_refusal(of("t", Limits(requests_per_minute=3))) is None
    assert (await rates.admit(of("t", Limits(tokens_per_minute=9)), "c", 9)).refused is None  # begins full
    lower = await rates.admit(of("t", Limits(tokens_per_minute=5)), "d", 5)
    assert (lower.refused, lower.tokens <= 1) == ("tokens", True)


async def test_a_clock_that_is_set_gives_and_takes_one_bucket_at_most(redis: Redis, valkey_url: str) -> None:
    rates, limits = RateLimits(redis), Limits(requests_per_minute=60)
    with SyncRedis.from_url(valkey_url) as sync:
        for i in range(60):
            await rates.admit(of("t", limits), f"a{i}", 0)
        passes(sync, "t", -3600)  # back by an hour
        assert (await rates.admit(of("t", limits), "b", 0)).refused == "requests"
        passes(sync, "t", 2)
        assert (await rates.admit(of("t", limits), "c", 0)).refused is None  # it refills from there
        passes(sync, "t", 3600)
        assert (await rates.admit(of("t", limits), "d", 0)).requests == pytest.approx(59, abs=0.5)


async def test_leases_from_before_the_clock_was_set_back_end_all_the_same(redis: Redis) -> None:
    rates, limits = RateLimits(redis, lease_seconds=0.2), Limits(concurrent_requests=1)
    await redis.zadd("pp:rates:t:leases", {"dead": time.time() * 1_000_000 + HOUR})
    assert (await rates.admit(of("t", limits), "a", 0)).refused == "concurrent"
    await asyncio.sleep(0.3)
    assert (await rates.admit(of("t", limits), "a", 0)).refused is None


async def test_a_lease_lives_while_its_process_does(redis: Redis) -> None:
    rates, limits = RateLimits(redis, lease_seconds=0.3), Limits(concurrent_requests=1)
    renewal = asyncio.create_task(rates.renew_leases())
    await rates.admit(of("t", limits), "long", 0)
    await asyncio.sleep(1.0)
    assert (await rates.admit(of("t", limits), "a", 0)).refused == "concurrent"
    await rates.settle("long", 0)
    assert (await rates.admit(of("t", limits), "b", 0)).refused is None
    renewal.cancel()
    await asyncio.sleep(0.5)
    assert (await rates.admit(of("t", limits), "c", 0)).refused is None


KILLED = """
import asyncio, sys
from adapters_store.valkey import connect
from server.tenancy.limits import Limits, Allowance
from server.tenancy.rate_limits import RateLimits

async def main():
    rates = RateLimits(connect(sys.argv[1]), lease_seconds=1.0)
    renewal = asyncio.create_task(rates.renew_leases())
    for i in range(3):
        await rates.admit([Allowance("t", Limits(concurrent_requests=3))], f"killed-{i}", 0)
    sys.stdout.write("up\\n")
    sys.stdout.flush()
    await renewal

asyncio.run(main())
"""


async def test_a_renewal_gives_no_lease(redis: Redis) -> None:
    """Neither to a request that ended meanwhile nor to one that Valkey has not admitted."""
    rates, limits = RateLimits(redis), Limits(requests_per_minute=10)
    rates._running["undecided"] = _Running(of("t", limits), 0)
    await rates._renew_all()
    assert await redis.zcard("pp:rates:t:leases") == 0
    assert (await rates.admit(of("t", limits), "undecided", 0)).requests == pytest.approx(9, abs=0.5)
    await rates._renew_all()
    assert await redis.zrange("pp:rates:t:leases", 0, -1) == [b"undecided"]


async def test_a_killed_process_leaves_nothing(redis: Redis, valkey_url: str) -> None:
    rates, limits = RateLimits(redis, lease_seconds=1.0), Limits(concurrent_requests=3)
    command = [sys.executable, "-c", KILLED, valkey_url]
    process = await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        await process.stdout.readline()
        await asyncio.sleep(1.5)  # longer than a lease: it is renewed
        assert (await rates.admit(of("t", limits), "a", 0)).refused == "concurrent"
    finally:
        process.kill()
        await process.wait()
    await asyncio.sleep(1.2)
    assert [(await rates.admit(of("t", limits), f"b{i}", 0)).refused for i in range(3)] == [None] * 3


async def test_a_caller_that_leaves_during_the_decision_holds_nothing(redis: Redis) -> None:
    rates, limits = RateLimits(redis), Limits(tokens_per_minute=1000, concurrent_requests=1)
    for i in range(20):
        leaving = asyncio.create_task(rates.admit(of("t", limits), f"gone{i}", 1000))
        await asyncio.sleep(random.random() * 0.002)
        leaving.cancel()
        try:
            verdict = await leaving
        except asyncio.CancelledError:
            continue
        if verdict.refused is None:
            await rates.settle(f"gone{i}", 1000)
    await rates.close()
    stays = await rates.admit(of("t", limits), "stays", 0)
    assert (stays.refused, stays.tokens) == (None, 1000)


async def test_without_valkey_the_limits_hold_in_the_process() -> None:
    rates = RateLimits(connect("unix:///nowhere/v.sock"))
    limits = Limits(requests_per_minute=3, tokens_per_minute=100)
    verdicts = [await rates.admit(of("t", limits), f"r{i}", 10) for i in range(4)]
    assert [verdict.refused for verdict in verdicts] == [None, None, None, "requests"]
    assert (await rates.count(of("t", limits))).refused == "requests"
    assert (await rates.admit(of("u", limits), "a", 100)).refused is None
    assert (await rates.admit(of("u", limits), "b", 50)).refused == "tokens"
    await rates.settle("a", 60)
    assert (await rates.admit(of("u", limits), "c", 50)).refused is None


async def test_two_deciders_admit_what_fifty_tenants_may(redis: Redis, valkey_url: str) -> None:
    """10,000 requests: each tenant gets its bucket and what flows in meanwhile, within 1 %."""
    clients = [connect(valkey_url) for _ in range(2)]
    deciders = [RateLimits(client, decision_seconds=60) for client in clients]
    limits = {f"t{i}": Limits(tokens_per_minute=20_000 + 400 * i) for i in range(50)}
    admitted: Counter[str] = Counter()
    calls: dict[str, list[tuple[float, float]]] = {tenant: [] for tenant in limits}

    async def ask(number: int, tenant: str) -> None:
        decider, before = deciders[number % 2], time.monotonic()
        verdict = await decider.admit(of(tenant, limits[tenant]), f"r{number}", 250)
        calls[tenant].append((before, time.monotonic()))
        if verdict.refused is None:
            admitted[tenant] += 250

    asked = [(number, f"t{number % 50}") for number in range(10_000)]
    for batch in range(0, len(asked), 100):
        await asyncio.gather(*(ask(number, tenant) for number, tenant in asked[batch : batch + 100]))
    for tenant, own in limits.items():
        per_minute = own.tokens_per_minute or 0
        (first_before, first_after), (last_before, last_after) = calls[tenant][0], calls[tenant][-1]
        # Valkey decided at some time between; on a busy machine that is long
        least = per_minute * (1 + max(0.0, last_before - first_after) / 60)
        most = per_minute * (1 + (last_after - first_before) / 60)
        assert 0.99 * min(least, 200 * 250) - 250 <= admitted[tenant] <= 1.01 * most
    for client in clients:
        await client.aclose()


@dataclass
class Model:
    """A bucket as a textbook has it."""

    limit: int
    left: float

    def passes(self, seconds: float) -> None:
        self.left = min(self.limit, self.left + seconds * self.limit / 60)

    def take(self, amount: float) -> None:
        self.left -= amount


EVENTS = st.lists(
    st.one_of(
        st.tuples(st.just("ask"), st.integers(0, 130)),
        st.tuples(st.just("end"), st.integers(0, 100)),  # per cent of its tokens are unused
        st.tuples(st.just("wait"), st.floats(0.05, 70)),
    ),
    max_size=40,
)


class Both:
    """The script and the bucket of one process, on the same course of events."""

    def __init__(self, redis: SyncRedis, limits: Limits) -> None:
        self.limits = limits
        self.redis = redis
        self.now = 0.0
        self.local = LocalRates(lambda: self.now)
        self.script = redis.register_script(ADMIT)

    def admit(self, request: str, tokens: int) -> tuple[Verdict, Verdict]:
        own = self.limits
        rates = [own.requests_per_minute or 0, own.tokens_per_minute or 0, 0]
        keys = ["pp:rates:t", "pp:rates:t:leases"]
        answer = self.script(keys, [request, tokens, LEASE, FULL, 0, *rates])
        refused, _allowance, wait, _waiting, requests, left, running = answer
        verdict = Verdict(refused.decode() or None, float(requests), float(left), running, wait / 1e6)
        return verdict, self.local.admit(of("t", self.limits), tokens, [running])

    def passes(self, seconds: float) -> None:
        self.now += seconds
        passes(self.redis, "t", seconds)

    def give_back(self, tokens: int) -> None:
        self.redis.hincrbyfloat("pp:rates:t", "tokens", tokens)
        self.local.give_back(of("t", self.limits), tokens)


@pytest.mark.parametrize("limits", [Limits(6, 100), Limits(6, None), Limits(None, 100)])
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(events=EVENTS)
def test_the_buckets_are_those_of_a_model(
    valkey_url: str, limits: Limits, events: list[tuple[str, float]]
) -> None:
    with SyncRedis.from_url(valkey_url) as redis:
        redis.flushall()
        both = Both(redis, limits)
        requests = Model(limits.requests_per_minute or 0, limits.requests_per_minute or 0)
        tokens = Model(limits.tokens_per_minute or 0, limits.tokens_per_minute or 0)
        running: list[int] = []
        for number, (kind, value) in enumerate(events):
            if kind == "wait":
                both.passes(value)
                requests.passes(value)
                tokens.passes(value)
            elif kind == "end" and running:
                unused = int(running.pop() * value / 100)
                both.give_back(unused)
                tokens.left = min(tokens.limit, tokens.left + unused)
            elif kind == "ask":
                amount = int(value)
                lack = limits.requests_per_minute is not None and requests.left < 1
                lack |= limits.tokens_per_minute is not None and tokens.left < amount
                near = abs(requests.left - 1) < 0.01 or abs(tokens.left - amount) < 0.1
                script, local = both.admit(f"r{number}", amount)
                if not near:  # real time passes between the calls
                    assert (script.refused is not None) == (local.refused is not None) == lack
                if (script.refused is None) != (local.refused is None):
                    return
                if script.refused is None:
                    running.append(amount)
                    requests.take(1)
                    tokens.take(amount)
                if limits.requests_per_minute is not None:
                    assert script.requests == pytest.approx(requests.left, abs=0.1)
                    assert local.requests == pytest.approx(requests.left, abs=1e-6)
                if limits.tokens_per_minute is not None:
                    assert script.tokens == pytest.approx(tokens.left, abs=1)
                    assert local.tokens == pytest.approx(tokens.left, abs=1e-6)


async def test_a_bucket_that_is_full_again_is_no_key(redis: Redis) -> None:
    rates = RateLimits(redis)
    await rates.admit(of("t", Limits(requests_per_minute=1)), "a", 0)
    assert 55_000 < await redis.pttl("pp:rates:t") <= 61_000
    assert 0 < await redis.pttl("pp:rates:t:leases") <= 60_000
    assert not NO_LIMITS.limits_rates


async def test_the_tightest_of_all_allowances_holds_and_all_pay(redis: Redis) -> None:
    rates = RateLimits(redis)
    tenant = Allowance("t", Limits(requests_per_minute=100, tokens_per_minute=1000))
    key = Allowance("t:key:k", RequestLimits(requests_per_minute=2), " for this key")
    adapter = Allowance("t:adapter:a", RequestLimits(tokens_per_minute=300, concurrent_requests=2))
    first = await rates.admit([tenant, key, adapter], "a", 250)
    assert (first.refused, first.limits.requests_per_minute, first.limits.tokens_per_minute) == (None, 2, 300)
    assert (math.floor(first.requests), math.floor(first.tokens)) == (1, 50)
    refused = await rates.admit([tenant, key, adapter], "b", 250)
    assert (refused.refused, refused.whose, refused.limits.tokens_per_minute) == ("tokens", "", 300)
    assert (await rates.admit([tenant, key], "c", 250)).refused is None
    refused = await rates.admit([tenant, key], "d", 10)
    assert (refused.refused, refused.whose) == ("requests", " for this key")
    assert rates.known_refusal([tenant, key]) is not None
    assert rates.known_refusal([tenant]) is None
    left = await rates.admit([tenant], "e", 0)
    assert left.running == 3
    assert left.tokens == pytest.approx(500, abs=40)
    assert (await rates.admit([tenant, adapter], "f", 1000)).refused == "size"
    await rates.settle("a", 250)
    left = await rates.admit([tenant, adapter], "g", 0)
    assert left.running == 3
    assert left.tokens == pytest.approx(300, abs=2)


async def test_tokens_that_wait(redis: Redis) -> None:
    rates, limits = RateLimits(redis), Limits(queued_tokens=100)
    elsewhere = RateLimits(redis)
    assert (await rates.admit(of("t", limits), "large", 500)).refused is None  # alone it may wait
    assert (await elsewhere.admit(of("t", limits), "a", 1)).refused == "queued"
    rates.begin("large")
    rates.begin("large")
    await rates.close()
    assert (await elsewhere.admit(of("t", limits), "b", 60)).waiting == 60
    refused = await rates.admit(of("t", limits), "c", 60)
    assert (refused.refused, refused.waiting) == ("queued", 60)
    await elsewhere.settle("b", 0)
    assert (await rates.admit(of("t", limits), "d", 60)).refused is None
    assert 0 < await redis.pttl("pp:rates:t:waiting") <= 60_000


async def test_a_killed_process_leaves_no_waiting_tokens(redis: Redis) -> None:
    limits = of("t", Limits(queued_tokens=100))
    dead, rates = RateLimits(redis, lease_seconds=0.3), RateLimits(redis, lease_seconds=0.3)
    assert (await dead.admit(limits, "dead", 90)).refused is None
    assert (await rates.admit(limits, "a", 90)).refused == "queued"
    await asyncio.sleep(0.4)
    assert (await rates.admit(limits, "a", 90)).waiting == 90
