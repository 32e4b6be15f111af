import asyncio
import random

import pytest
from redis.asyncio import Redis

from adapters_store.valkey import connect
from server.errors import InvalidField, NotFound, StoreError
from server.tenancy.keys import KEY_LENGTH, new_secret
from server.tenancy.limits import NO_LIMITS, Limits
from server.tenancy.tenants import Tenant, Tenants

pytestmark = pytest.mark.anyio


async def whose(tenants: Tenants, secret: str) -> tuple[Tenant, Limits] | None:
    caller = await tenants.authenticate(secret)
    return caller and (caller.tenant, caller.limits)


async def test_a_secret_opens_its_own_tenant_only(tenants: Tenants) -> None:
    a, key_of_a = await tenants.create("a", weight=2.0)
    b, key_of_b = await tenants.create("b")
    assert await whose(tenants, key_of_a) == (a, NO_LIMITS)
    assert await whose(tenants, key_of_b) == (b, NO_LIMITS)
    assert (a.id, a.name, a.weight) != (b.id, b.name, b.weight)
    assert {t.id for t in await tenants.list()} == {a.id, b.id}


async def test_wrong_keys_are_nobody_and_never_an_error(tenants: Tenants) -> None:
    _, secret = await tenants.create("a")
    changed = secret[:-1] + ("A" if secret[-1] != "A" else "B")
    strange = [
        "",
        "x",
        changed,
        secret + "x",
        secret[:-1],
        "pp-" + "é" * 43,
        "pp-\x00",
        "p" * 8192,
        "\ud800" * 46,
    ]
    assert [await tenants.authenticate(key) for key in strange] == [None] * len(strange)


async def test_a_revoked_key_fails_at_once_and_the_others_stay(tenants: Tenants, valkey_url: str) -> None:
    tenant, first = await tenants.create("a")
    info, second = await tenants.add_key(tenant.id)
    elsewhere = connect(valkey_url)
    assert await whose(Tenants(elsewhere), second) == (tenant, NO_LIMITS)
    await tenants.revoke(tenant.id, info.id)
    assert await Tenants(elsewhere).authenticate(second) is None
    assert await whose(tenants, first) == (tenant, NO_LIMITS)
    assert info.id not in [key.info.id for key in await tenants.keys(tenant.id)]
    with pytest.raises(NotFound):
        await tenants.revoke(tenant.id, info.id)
    await elsewhere.aclose()


async def test_one_tenant_cannot_revoke_anothers_key(tenants: Tenants) -> None:
    a, secret = await tenants.create("a")
    b, _ = await tenants.create("b")
    (key,) = await tenants.keys(a.id)
    with pytest.raises(NotFound):
        await tenants.revoke(b.id, key.info.id)
    assert await whose(tenants, secret) == (a, NO_LIMITS)


async def test_no_secret_is_kept(tenants: Tenants, redis: Redis) -> None:
    tenant, secret = await tenants.create("a")
    kept = [str(key) + str(await redis.hgetall(key)) for key in await redis.keys("*")]
    assert len(secret) == KEY_LENGTH
    assert secret not in "".join(kept)
    assert secret not in repr(await tenants.keys(tenant.id))


@pytest.mark.parametrize("name", ["", "x" * 65, "a\nb", "a\x00"])
async def test_names_are_bounded_and_printable(tenants: Tenants, name: str) -> None:
    with pytest.raises(InvalidField, match="name"):
        await tenants.create(name)
    assert await tenants.list() == []


@pytest.mark.parametrize("weight", [0, -1, 1001, float("nan"), float("inf")])
async def test_weights_are_positive_and_bounded(tenants: Tenants, weight: float) -> None:
    with pytest.raises(InvalidField, match="weight"):
        await tenants.create("a", weight)


async def test_unknown_tenants_are_not_found(tenants: Tenants) -> None:
    for call in (tenants.get, tenants.keys, tenants.add_key):
        with pytest.raises(NotFound):
            await call("ten_x")


async def test_valkey_down_is_a_store_error_and_never_a_no() -> None:
    nobody = connect("unix:///nonexistent/v.sock")
    with pytest.raises(StoreError):
        await Tenants(nobody).authenticate(new_secret())
    await nobody.aclose()


async def test_cancelled_calls_never_answer_somebody_else(valkey_url: str, redis: Redis) -> None:
    """2,000 calls on four connections, every third cancelled midway: each gets its own tenant or nothing."""
    client = connect(valkey_url)
    client.connection_pool.max_connections = 4
    tenants = Tenants(client)
    made = [await tenants.create(f"tenant {i}") for i in range(20)]
    rng = random.Random(7)
    answered = cancelled = 0

    async def ask(i: int) -> None:
        nonlocal answered
        tenant, secret = made[i % len(made)]
        assert await whose(tenants, secret) == (tenant, NO_LIMITS)
        answered += 1

    for _ in range(20):
        calls = [asyncio.create_task(ask(rng.randrange(1000))) for _ in range(100)]
        for call in calls[::3]:
            await asyncio.sleep(rng.random() * 0.0005)
            call.cancel()
        for outcome in await asyncio.gather(*calls, return_exceptions=True):
            cancelled += isinstance(outcome, asyncio.CancelledError)
            assert outcome is None or isinstance(outcome, asyncio.CancelledError)
    assert answered > 1000
    assert cancelled > 20
    assert len(client.connection_pool._in_use_connections) == 0, "a place in the pool is lost"
    for tenant, secret in made:
        assert await whose(tenants, secret) == (tenant, NO_LIMITS)
    await client.aclose()
