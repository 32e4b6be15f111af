"""What is deleted, retained, restored and purged: in the index and, after whatever crash, in the store."""

import asyncio

import pytest
from redis.asyncio import Redis

from adapters_store.index.index import MAX_ROLLBACKS
from adapters_store.index.keys import DELETED, DELETING
from adapters_store.names import deleted_key, manifest_key
from adapters_store.object_store.store import Objects
from adapters_store.registry.registry import Registry
from server.errors import Conflict, NotFound, QuotaExceeded
from tests.adapters_store.test_registry import publish
from tests.fixtures.faults import Failing
from tests.fixtures.services import held_to

pytestmark = pytest.mark.anyio
MARK = deleted_key("t", "a", 1)


async def versions(registry: Registry, name: str = "a") -> list[int]:
    return [version.version for version in (await registry.get("t", name)).versions]


async def deleted(registry: Registry, tenant: str = "t") -> dict[str, list[int]]:
    return {one.name: [v.version.version for v in one.versions] for one in await registry.deleted(tenant)}


async def test_old_versions_go_unless_an_alias_points_there(objects: Objects, redis: Redis) -> None:
    registry = Registry(objects, redis, keep_versions=2)
    for number in range(1, 6):
        await publish(registry, "t", "a")
        if number == 2:
            await registry.aliases.set("t", "a", "prod", {1: 0.5, 2: 0.5})
    assert await versions(registry) == [1, 2, 4, 5]
    await registry.aliases.unset("t", "a", "prod")
    await publish(registry, "t", "a")
    assert await versions(registry) == [5, 6]
    assert await deleted(registry) == {"a": [1, 2, 3, 4]}
    newest = (await registry.history("t", "a"))[0]
    assert (newest.action, newest.added, newest.removed) == ("publish", (6,), (1, 2, 4))
    await registry.restore("t", "a", 3)
    assert await versions(registry) == [3, 5, 6]
    assert len(await objects.list("tenants/t/deleted")) == 3


async def test_what_was_deleted_long_ago_is_purged(objects: Objects, redis: Redis) -> None:
    registry = Registry(objects, redis, retention_seconds=3600)
    for name in "ab":
        await publish(registry, "t", name)
        await registry.delete("t", name)
    await redis.zadd(DELETED, {manifest_key("t", "a", 1): 1})  # looks due, but says itself that it is not
    await asyncio.wait_for(Registry(objects, redis, retention_seconds=-1).finish_deletes(), 10)
    assert await deleted(registry) == {}
    assert await objects.list("tenants") == []
    assert [entry.action for entry in await registry.history("t", "a")] == ["purge", "delete", "publish"]
    with pytest.raises(NotFound):
        await registry.restore("t", "a")


async def test_a_due_list_that_is_wrong_ends_too(registry: Registry, redis: Redis) -> None:
    """After a part of Valkey was lost."""
    await publish(registry, "t", "a")
    await registry.delete("t", "a")
    await redis.delete("pp:adapter:t:a:deleted")
    registry.retention = -1
    await asyncio.wait_for(registry.finish_deletes(), 10)
    assert await redis.zcard(DELETED) == 0


async def test_a_store_that_is_away_learns_later(objects: Objects, redis: Redis) -> None:
    healthy = Registry(objects, redis)
    await publish(healthy, "t", "a")
    await Registry(Failing(objects, 1, after=False), redis).delete("t", "a")  # type: ignore[arg-type]
    assert await objects.list("tenants/t/deleted") == []
    assert await deleted(healthy) == {"a": [1]}
    await healthy.finish_deletes()
    assert await objects.list("tenants/t/deleted") == [MARK]
    await Registry(Failing(objects, 1, after=False), redis).restore("t", "a")  # type: ignore[arg-type]
    assert await objects.list("tenants/t/deleted") == [MARK]
    await healthy.finish_deletes()
    assert await objects.list("tenants/t/deleted") == []
    for at in range(1, 5):  # blob, manifest, mark: each in turn
        await publish(healthy, "t", "b")
        broken = Failing(objects, at, after=False)
        await Registry(broken, redis).delete("t", "b", purge=True)  # type: ignore[arg-type]
        await healthy.finish_deletes()
        assert await objects.list("tenants/t/adapters/b") == []
        assert len(await objects.list("tenants/t/blobs")) == 1
    assert broken.calls >= at
    assert await redis.scard(DELETING) == 0


async def test_the_last_word_reaches_the_store(objects: Objects, redis: Redis) -> None:
    registries = [Registry(objects, redis) for _ in range(4)]
    await publish(registries[0], "t", "a")

    async def turn(registry: Registry) -> None:
        for _ in range(10):
            for change in (registry.delete, registry.restore):
                try:
                    await change("t", "a")
                except NotFound:  # another was faster
                    continue

    await asyncio.gather(*map(turn, registries))
    await registries[0].finish_deletes()
    gone = await deleted(registries[0]) == {"a": [1]}
    assert await objects.list("tenants/t/deleted") == ([MARK] if gone else [])
    assert await redis.scard(DELETING) == 0


async def test_a_lost_index_learns_again_what_is_deleted(
    registry: Registry, objects: Objects, redis: Redis
) -> None:
    for _ in range(3):
        await publish(registry, "t", "a")
    await publish(registry, "t", "b")
    await registry.delete("t", "a", 3)
    await registry.delete("t", "b")
    before = await registry.deleted("t")
    await redis.flushall()
    assert await registry.rebuild_index() == 4
    assert await registry.deleted("t") == before
    assert (await versions(registry), (await registry.get("t", "a")).latest.version) == ([1, 2], 2)
    assert await publish(registry, "t", "a") == 4, "a deleted version's number is not free"
    await registry.restore("t", "b")
    assert await versions(registry, "b") == [1]
    await redis.flushall()
    await objects.put(MARK, b"{")  # cannot be read, and yet it says so
    assert await registry.rebuild_index() == 5
    assert await deleted(registry) == {"a": [1, 3]}


async def test_a_version_whose_blobs_are_gone_is_none(
    registry: Registry, objects: Objects, redis: Redis
) -> None:
    await publish(registry, "t", "a")
    await publish(registry, "t", "a")
    (blob, *_) = (await registry.manifest("t", "a", 2)).files
    await objects.delete(blob.key)
    await redis.flushall()
    assert await registry.rebuild_index() == 1
    assert await versions(registry) == [1]


async def test_what_is_restored_has_to_fit(
    objects: Objects, redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = Registry(objects, redis, held_to(adapters=1))
    await publish(registry, "t", "a")
    await registry.delete("t", "a")
    await publish(registry, "t", "b")
    with pytest.raises(QuotaExceeded, match="1 adapters"):
        await registry.restore("t", "a")
    await registry.delete("t", "b")
    await publish(registry, "t", "b")
    monkeypatch.setattr("adapters_store.registry.registry.MAX_VERSIONS", 1)
    with pytest.raises(QuotaExceeded, match="1 versions"):
        await registry.restore("t", "b")
    assert await deleted(registry) == {"a": [1], "b": [1]}


async def test_history_and_rollbacks_are_bounded(registry: Registry) -> None:
    for _ in range(2):
        await publish(registry, "t", "a")
    for number in range(230):
        await registry.aliases.set("t", "a", "prod", 1 + number % 2)
    entries = await registry.history("t", "a")
    assert len(entries) == 200
    assert {entry.action for entry in entries} == {"alias"}
    for _ in range(MAX_ROLLBACKS):
        await registry.aliases.rollback("t", "a", "prod")
    with pytest.raises(Conflict):
        await registry.aliases.rollback("t", "a", "prod")


async def test_a_history_of_nothing_expires(registry: Registry, redis: Redis) -> None:
    await publish(registry, "t", "a")
    key = "pp:adapter:t:a:history"
    assert await redis.ttl(key) == -1
    await registry.delete("t", "a")
    assert await redis.ttl(key) == -1
    await registry.delete("t", "a", purge=True)
    assert 0 < await redis.ttl(key) <= 90 * 86_400
    assert not await redis.exists("pp:adapter:t:a:state", "pp:adapter:t:a:aliases", "pp:deleted:t")
    await publish(registry, "t", "a")
    assert await redis.ttl(key) == -1
