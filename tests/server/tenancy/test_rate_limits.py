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
from server.tenancy.limits import NO_LIMITS, Limits
from server.tenancy.local_rates import FULL_SECONDS, LocalRates, Verdict
from server.tenancy.rate_limits import RateLimits
from server.tenancy.rate_limits_lua import ADMIT

pytestmark = pytest.mark.anyio
LEASE = 30_000_000
FULL = int(FULL_SECONDS * 1_000_000)
HOUR = 3_600_000_000


def passes(redis: SyncRedis, tenant: str, seconds: float) -> None:
    """Time goes by (or back) for the bucket: what it remembers moves the other way."""
    key = f"pp:rates:{tenant}"
    if at := redis.hget(key, "at"):
        redis.hset(key, "at", int(at) - int(seconds * 1_000_000))


async def test_a_minutes_requests_pass_and_no_more(redis: Redis) -> None:
    rates, limits = RateLimits(redis), Limits(requests_per_minute=3)
    verdicts = [await rates.admit("t", limits, f"r{i}", 5) for i in range(4)]
    assert [verdict.refused for verdict in verdicts] == [None, None, None, "requests"]
    assert [math.floor(verdict.requests) for verdict in verdicts] == [2, 1, 0, 0]
    assert verdicts[-1].wait == pytest.approx(20, abs=1)
    assert (await rates.admit("other", limits, "r", 5)).refused is None


async def test_requests_and_tokens_are_taken_together_or_not_at_all(redis: Redis) -> None:
    rates, limits = RateLimits(redis), Limits(requests_per_minute=10, tokens_per_minute=1000)
    assert (await rates.admit("t", limits, "a", 700)).refused is None
    refused = await rates.admit("t", limits, "b", 700)
    assert (refused.refused, math.floor(refused.requests)) == ("tokens", 9)
    assert refused.wait == pytest.approx(24, abs=1)  # 400 are short
    assert (await rates.admit("t", limits, "c", 300)).refused is None
    assert (await rates.admit("t", limits, "d", 1001)).refused == "size"


async def test_what_is_not_used_comes_back_once(redis: Redis) -> None:
    rates, limits = RateLimits(redis), Limits(tokens_per_minute=1000)
    await rates.admit("t", limits, "a", 1000)
    await rates.settle("a", 600)
    rates._running["a"] = "t"  # the end of the request is told again, as by a retry
    await rates.settle("a", 600)
    assert (await rates.admit("t", limits, "b", 0)).tokens == pytest.approx(600, abs=20)


async def test_a_request_that_is_sent_again_pays_once(redis: Redis) -> None:
    """redis-py repeats a command whose answer was lost."""
    rates, limits = RateLimits(redis), Limits(requests_per_minute=10, concurrent_requests=1)
    first = await rates.admit("t", limits, "a", 1)
    again = await rates.admit("t", limits, "a", 1)
    assert (again.refused, again.running) == (None, 1)
    assert again.requests == pytest.approx(first.requests, abs=0.5)


async def test_requests_at_once(redis: Redis) -> None:
    rates, limits = RateLimits(redis), Limits(concurrent_requests=2)
    elsewhere = RateLimits(redis)
    assert (await rates.admit("t", limits, "a", 1)).refused is None
    assert (await elsewhere.admit("t", limits, "b", 1)).refused is None
    assert (await elsewhere.admit("t", limits, "c", 1)).refused == "concurrent"
    await rates.settle("a", 0)
    assert (await elsewhere.admit("t", limits, "d", 1)).refused is None


async def test_a_limit_changes_at_once(redis: Redis) -> None:
    rates = RateLimits(redis)
    for i in range(2):
        assert (await rates.admit("t", Limits(requests_per_minute=2), f"a{i}", 0)).refused is None
    assert (await rates.admit("t", Limits(requests_per_minute=2), "b", 0)).refused == "requests"
    assert rates.known_refusal("t", Limits(requests_per_minute=2)) is not None
    assert rates.known_refusal("t", Limits(requests_per_minute=3)) is None
    assert (await rates.admit("t", Limits(tokens_per_minute=9), "c", 9)).refused is None  # begins full
    lower = await rates.admit("t", Limits(tokens_per_minute=5), "d", 5)
    assert (lower.refused, lower.tokens <= 1) == ("tokens", True)


async def test_a_clock_that_is_set_gives_and_takes_one_bucket_at_most(redis: Redis, valkey_url: str) -> None:
    rates, limits = RateLimits(redis), Limits(requests_per_minute=60)
    with SyncRedis.from_url(valkey_url) as sync:
        for i in range(60):
            await rates.admit("t", limits, f"a{i}", 0)
        passes(sync, "t", -3600)  # back by an hour
        assert (await rates.admit("t", limits, "b", 0)).refused == "requests"
        passes(sync, "t", 2)
        assert (await rates.admit("t", limits, "c", 0)).refused is None  # it refills from there
        passes(sync, "t", 3600)
        assert (await rates.admit("t", limits, "d", 0)).requests == pytest.approx(59, abs=0.5)


async def test_leases_from_before_the_clock_was_set_back_end_all_the_same(redis: Redis) -> None:
    rates, limits = RateLimits(redis, lease_seconds=0.2), Limits(concurrent_requests=1)
    await redis.zadd("pp:rates:t:leases", {"dead": time.time() * 1_000_000 + HOUR})
    assert (await rates.admit("t", limits, "a", 0)).refused == "concurrent"
    await asyncio.sleep(0.3)
    assert (await rates.admit("t", limits, "a", 0)).refused is None


async def test_a_lease_lives_while_its_process_does(redis: Redis) -> None:
    rates, limits = RateLimits(redis, lease_seconds=0.3), Limits(concurrent_requests=1)
    renewal = asyncio.create_task(rates.renew_leases())
    await rates.admit("t", limits, "long", 0)
    await asyncio.sleep(1.0)
    assert (await rates.admit("t", limits, "a", 0)).refused == "concurrent"
    await rates.settle("long", 0)
    assert (await rates.admit("t", limits, "b", 0)).refused is None
    renewal.cancel()
    await asyncio.sleep(0.5)
    assert (await rates.admit("t", limits, "c", 0)).refused is None


KILLED = """
import asyncio, sys
from adapters_store.valkey import connect
from server.tenancy.limits import Limits
from server.tenancy.rate_limits import RateLimits

async def main():
    rates = RateLimits(connect(sys.argv[1]), lease_seconds=1.0)
    renewal = asyncio.create_task(rates.renew_leases())
    for i in range(3):
        await rates.admit("t", Limits(concurrent_requests=3), f"killed-{i}", 0)
    sys.stdout.write("up\\n")
    sys.stdout.flush()
    await renewal

asyncio.run(main())
"""


async def test_a_renewal_gives_no_lease(redis: Redis) -> None:
    """Neither to a request that ended meanwhile nor to one that Valkey has not admitted."""
    rates, limits = RateLimits(redis), Limits(requests_per_minute=10)
    rates._running["undecided"] = "t"
    await rates._renew_all()
    assert await redis.zcard("pp:rates:t:leases") == 0
    assert (await rates.admit("t", limits, "undecided", 0)).requests == pytest.approx(9, abs=0.5)
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
        assert (await rates.admit("t", limits, "a", 0)).refused == "concurrent"
    finally:
        process.kill()
        await process.wait()
    await asyncio.sleep(1.2)
    assert [(await rates.admit("t", limits, f"b{i}", 0)).refused for i in range(3)] == [None] * 3


async def test_a_caller_that_leaves_during_the_decision_holds_nothing(redis: Redis) -> None:
    rates, limits = RateLimits(redis), Limits(tokens_per_minute=1000, concurrent_requests=1)
    for i in range(20):
        leaving = asyncio.create_task(rates.admit("t", limits, f"gone{i}", 1000))
        await asyncio.sleep(random.random() * 0.002)
        leaving.cancel()
        try:
            verdict = await leaving
        except asyncio.CancelledError:
            continue
        if verdict.refused is None:
            await rates.settle(f"gone{i}", 1000)
    await rates.close()
    stays = await rates.admit("t", limits, "stays", 0)
    assert (stays.refused, stays.tokens) == (None, 1000)


async def test_without_valkey_the_limits_hold_in_the_process() -> None:
    rates = RateLimits(connect("unix:///nowhere/v.sock"))
    limits = Limits(requests_per_minute=3, tokens_per_minute=100)
    verdicts = [await rates.admit("t", limits, f"r{i}", 10) for i in range(4)]
    assert [verdict.refused for verdict in verdicts] == [None, None, None, "requests"]
    assert (await rates.count("t", limits)).refused == "requests"
    assert (await rates.admit("u", limits, "a", 100)).refused is None
    assert (await rates.admit("u", limits, "b", 50)).refused == "tokens"
    await rates.settle("a", 60)
    assert (await rates.admit("u", limits, "c", 50)).refused is None


async def test_two_deciders_admit_what_fifty_tenants_may(redis: Redis, valkey_url: str) -> None:
    """10,000 requests: each tenant gets its bucket and what flows in meanwhile, within 1 %."""
    clients = [connect(valkey_url) for _ in range(2)]
    deciders = [RateLimits(client, decision_seconds=60) for client in clients]
    limits = {f"t{i}": Limits(tokens_per_minute=20_000 + 400 * i) for i in range(50)}
    admitted: Counter[str] = Counter()
    calls: dict[str, list[tuple[float, float]]] = {tenant: [] for tenant in limits}

    async def ask(number: int, tenant: str) -> None:
        decider, before = deciders[number % 2], time.monotonic()
        verdict = await decider.admit(tenant, limits[tenant], f"r{number}", 250)
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
        refused, requests, left, running, wait = self.script(keys, [request, tokens, LEASE, FULL, *rates])
        verdict = Verdict(refused.decode() or None, float(requests), float(left), running, wait / 1e6)
        return verdict, self.local.admit("t", self.limits, tokens, running)

    def passes(self, seconds: float) -> None:
        self.now += seconds
        passes(self.redis, "t", seconds)

    def give_back(self, tokens: int) -> None:
        self.redis.hincrbyfloat("pp:rates:t", "tokens", tokens)
        self.local.give_back("t", tokens)


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
    await rates.admit("t", Limits(requests_per_minute=1), "a", 0)
    assert 55_000 < await redis.pttl("pp:rates:t") <= 61_000
    assert 0 < await redis.pttl("pp:rates:t:leases") <= 60_000
    assert not NO_LIMITS.limits_rates
