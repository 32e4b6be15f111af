"""Limits while Valkey is away: its last known share, by this process; what was used is paid afterwards."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from redis.asyncio import Redis

from adapters_store.outage import Outage
from adapters_store.valkey import connect
from server.tenancy.debts import MAX_DEBTS, PART, Debts
from server.tenancy.limits import Allowance, Limits
from server.tenancy.local_rates import LocalRates
from server.tenancy.rate_limits import RateLimits
from server.tenancy.verdict import Left
from tests.fixtures.services import stopped

pytestmark = pytest.mark.anyio


def of(limits: Limits, tenant: str = "t") -> list[Allowance]:
    return [Allowance(tenant, limits)]


def impatient(redis: Redis) -> RateLimits:
    return RateLimits(redis, outage=Outage(answer_seconds=0.2))


async def answers(rates: RateLimits, redis: Redis) -> None:
    """Until Valkey is known to be back: a caller finds out once a second."""
    await redis.ping()
    rates._outage._ask_again = 0.0


async def test_the_last_known_share_holds_and_is_paid(redis: Redis, valkey_url: str) -> None:
    limits = of(Limits(requests_per_minute=10, tokens_per_minute=1000))
    rates, other = impatient(redis), RateLimits(redis)
    for decider in (rates, other):
        await decider._renew_all()
    await rates._renew_all()  # it knows of the other now
    for number in range(4):
        await rates.admit(limits, f"before{number}", 50)
        await rates.settle(f"before{number}", 0)
    with stopped(valkey_url):
        verdicts = [await rates.admit(limits, f"r{number}", 100) for number in range(6)]
        admitted = sum(verdict.refused is None for verdict in verdicts)
        assert admitted in {3, 4}  # half of what was left, and what flowed in
        assert [verdict.refused for verdict in verdicts[admitted:]] == ["requests"] * (6 - admitted)
        assert 0 < verdicts[-1].wait <= 12  # its share is five a minute
        await rates.settle("r0", 90)
    await answers(rates, redis)
    for number in range(1, admitted):
        await rates.settle(f"r{number}", 0)
    await rates._pay_debts()
    left = await other.admit(limits, "after", 0)
    assert left.requests == pytest.approx(10 - 4 - admitted - 1, abs=2)  # some flows in meanwhile
    assert left.tokens == pytest.approx(1000 - 200 - 100 * admitted + 90, abs=200)


async def test_what_valkey_took_as_well_is_not_paid_twice(redis: Redis, valkey_url: str) -> None:
    """It was slow, not dead: it executes what it was sent, later."""
    limits = of(Limits(requests_per_minute=100, tokens_per_minute=1000, concurrent_requests=5))
    rates = impatient(redis)
    await rates.admit(limits, "warm", 0)  # the script is known, and a connection is open
    await rates.settle("warm", 0)
    with stopped(valkey_url):
        assert (await rates.admit(limits, "slow", 400)).refused is None
    await answers(rates, redis)
    await rates.settle("slow", 100)
    await rates.close()
    await rates._pay_debts()
    after = await rates.admit(limits, "after", 0)
    assert after.running == 1
    assert after.requests == pytest.approx(97, abs=1.5)
    assert after.tokens == pytest.approx(700, abs=30)


async def test_a_payment_is_made_once(redis: Redis) -> None:
    limits = of(Limits(requests_per_minute=100, tokens_per_minute=1000))
    rates = RateLimits(redis)
    rates._debts.add(limits, 300)
    payment = rates._debts.payment()
    assert payment is not None
    await rates._pay_debts()
    rates._debts._sent = payment  # its answer was lost
    await rates._pay_debts()
    assert not rates._debts
    left = await rates.admit(limits, "a", 0)
    assert left.requests == pytest.approx(98, abs=0.9)
    assert left.tokens == pytest.approx(700, abs=9)


async def test_a_debt_is_one_bucket_at_most(redis: Redis) -> None:
    limits = of(Limits(requests_per_minute=10, tokens_per_minute=100))
    rates = RateLimits(redis)
    for _ in range(50):
        rates._debts.add(limits, 100)
    await rates._pay_debts()
    refused = await rates.admit(limits, "a", 0)
    assert refused.refused == "requests"
    assert refused.requests == pytest.approx(-10, abs=0.9)
    assert refused.wait <= 66
    assert 110_000 < await redis.pttl("pp:rates:t") <= 121_000


async def test_waiting_tokens_and_requests_at_once_are_shared_too() -> None:
    rates = RateLimits(connect("unix:///nowhere/v.sock"), processes=2)
    limits = of(Limits(concurrent_requests=3))
    assert [(await rates.admit(limits, f"c{i}", 1)).refused for i in range(3)] == [None, None, "concurrent"]
    queue = of(Limits(queued_tokens=100), "q")
    assert [(await rates.admit(queue, f"q{i}", 40)).refused for i in range(2)] == [None, "queued"]
    rates.begin("q0")
    assert (await rates.admit(queue, "q2", 400)).refused is None
    await rates.close()


def test_debts_are_bounded_and_sums() -> None:
    debts = Debts()
    for number in range(MAX_DEBTS + 5):
        debts.add(of(Limits(), f"t{number}"), 1)
    debts.add(of(Limits(), "t0"), 2)
    paid = []
    while payment := debts.payment():
        assert len(payment.debts) <= PART
        assert debts.payment() is payment
        debts.paid(payment)
        paid += payment.debts
    assert len(paid) == MAX_DEBTS
    assert (paid[0].requests, paid[0].tokens) == (2, 3)


@settings(max_examples=50, deadline=None)
@given(
    processes=st.integers(1, 8),
    limit=st.integers(1, 50),
    left=st.floats(-50, 50),
    asks=st.lists(st.floats(0, 20), min_size=1, max_size=60),
)
def test_never_unlimited_and_never_all_refused(
    processes: int, limit: int, left: float, asks: list[float]
) -> None:
    """All processes together admit what was left and what flows in, and one request each above it."""
    now, limits, admitted = 0.0, of(Limits(requests_per_minute=limit)), 0
    deciders = [LocalRates(lambda: now) for _ in range(processes)]
    for decider in deciders:
        decider.processes = processes
        decider.learn(limits[0], Left(min(left, limit), 0, 0))
    for seconds in asks:
        now += seconds
        for decider in deciders:
            while decider.admit(limits, 0, [0]).refused is None:
                admitted += 1
    may = max(0.0, min(left, limit)) + now * limit / 60
    assert admitted <= may + processes
    if min(left, limit) >= processes:
        assert admitted >= math.floor(min(left, limit))
    now += 60 * processes / limit + 1
    assert deciders[0].admit(limits, 0, [0]).refused is None
