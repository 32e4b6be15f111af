"""A Valkey and a store prove that they belong together, from whichever version they come."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis

from adapters_store.manifest import Manifest
from adapters_store.object_store.store import Objects
from adapters_store.registry import identity
from adapters_store.registry.identity import KEY, OBJECT, prove_identity, prove_identity_in_time
from adapters_store.registry.registry import Registry
from server.errors import StartupError, StoreError
from tests.fixtures.s3 import Weed

pytestmark = pytest.mark.anyio


@pytest.fixture
def other(tmp_path: Path) -> Objects:
    return Objects.open((tmp_path / "other").as_uri())


async def publish(registry: Registry, name: str) -> None:
    blobs = await registry.stage("t", [("adapter_model.safetensors", Path(__file__))])
    await registry.publish(
        Manifest(
            tenant="t",
            name=name,
            version=1,
            method="lora",
            base="toy",
            base_digest="b",
            digest="d",
            files=blobs,
            config={},
            tensors={},
            created=1,
        )
    )


async def test_many_that_start_at_once_agree(redis: Redis, objects: Objects) -> None:
    await asyncio.gather(*(prove_identity(redis, objects) for _ in range(8)))
    await prove_identity(redis, objects)
    known: Any = await redis.get(KEY)
    assert known in await objects.get(OBJECT)


async def test_the_same_in_s3(redis: Redis, weed: Weed) -> None:
    objects = Objects.open(weed.url("identity"), options=weed.options())
    await asyncio.gather(*(prove_identity(redis, objects) for _ in range(8)))
    with pytest.raises(StartupError, match="do not belong together"):
        await prove_identity(redis, Objects.open(weed.url("elsewhere"), options=weed.options()))


@pytest.mark.parametrize("used", [False, True])
async def test_another_store_is_refused_and_left_as_it_is(
    redis: Redis, objects: Objects, other: Objects, used: bool
) -> None:
    """`used`: it is another system's, and not just a folder that was made by an option left out."""
    if used:
        await other.create(OBJECT, b'{"identity": "another"}')
    await prove_identity(redis, objects)
    known: Any = await redis.get(KEY)
    with pytest.raises(StartupError, match=known.decode()):
        await prove_identity(redis, other)
    assert await redis.get(KEY) == known
    assert await other.list("tenants") == []
    await prove_identity(redis, objects)


async def test_an_older_version_s_stores_are_taken_together_and_no_others(
    redis: Redis, objects: Objects, other: Objects, registry: Registry
) -> None:
    await publish(registry, "mine")
    with pytest.raises(StartupError, match="none of the adapters"):
        await prove_identity(redis, other)
    await prove_identity(redis, objects)
    with pytest.raises(StartupError):
        await prove_identity(redis, other)


async def test_a_valkey_that_was_lost_takes_the_store_s(
    redis: Redis, objects: Objects, registry: Registry
) -> None:
    await publish(registry, "mine")
    await prove_identity(redis, objects)
    known = await redis.get(KEY)
    await redis.flushall()
    await prove_identity(redis, objects)
    assert await redis.get(KEY) == known
    assert await registry.rebuild_index() == 1


async def test_what_lies_there_in_its_place_is_refused(redis: Redis, objects: Objects) -> None:
    await objects.put(OBJECT, b"not ours")
    with pytest.raises(StartupError, match=OBJECT):
        await prove_identity(redis, objects)


async def test_who_does_not_answer_is_waited_for(
    redis: Redis, objects: Objects, other: Objects, monkeypatch: pytest.MonkeyPatch
) -> None:
    await prove_identity(redis, objects)
    monkeypatch.setattr(identity, "MAX_DELAY_SECONDS", 0.01)
    failures = iter([StoreError("Down."), StoreError("Down.")])
    real = other.get

    async def get(key: str) -> bytes:
        if failure := next(failures, None):
            raise failure
        return await real(key)

    monkeypatch.setattr(other, "get", get)
    with pytest.raises(StartupError):
        await prove_identity_in_time(redis, other)
