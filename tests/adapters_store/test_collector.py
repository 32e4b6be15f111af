"""No blob that a version needs is ever removed: uploads and collectors in each other's way at every step."""

import asyncio
import os
import random
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis

from adapters_store.index.keys import STAGED
from adapters_store.maintenance.blob_leases import BlobLeases
from adapters_store.maintenance.collector import Collector
from adapters_store.maintenance.stale_temp_files import remove_stale_temp_files
from adapters_store.names import manifest_key
from adapters_store.object_store.store import Objects
from adapters_store.registry.registry import Registry
from server.errors import StoreError
from tests.adapters_store.test_registry import manifest, publish, stage
from tests.fixtures.faults import Interrupted

pytestmark = pytest.mark.anyio
NO_GRACE = -1.0


async def expire(redis: Redis) -> None:
    """As if the grace period of all that is staged were over."""
    keys: Any = await redis.zrange(STAGED, 0, -1)
    for key in keys:
        await redis.zadd(STAGED, {key: 1}, xx=True)


async def whole(objects: Objects, registry: Registry) -> int:
    """Every version's files can be read; how many versions there are."""
    count = 0
    for adapter in await registry.list("t"):
        for version in adapter.versions:
            made = await registry.manifest("t", adapter.name, version.version)
            for blob in made.files:
                assert (await objects.head(blob.key)).bytes == blob.bytes
            count += 1
    return count


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("late", [False, True])
async def test_an_upload_that_ends_at_any_step_of_a_collector(
    objects: Objects, redis: Redis, *, late: bool, after: bool
) -> None:
    """Its blobs are in the store, its time is over if it is `late`; its manifest comes meanwhile."""
    outcomes = []
    for at in range(1, 9):
        await redis.flushall()
        for key in await objects.list("tenants"):
            await objects.delete(key)
        registry = Registry(objects, redis)
        await publish(registry, "t", "kept")
        blobs = await stage(registry, "t")
        if late:
            await expire(redis)

        async def finish(registry: Registry = registry, blobs: Any = blobs) -> None:
            try:
                await registry.publish(manifest("t", "a", 1, "d", blobs))
                outcomes.append("published")
            except StoreError:
                outcomes.append("refused")

        broken = Interrupted(objects, at, finish, after=after)
        collector = Collector(broken, BlobLeases(redis), NO_GRACE)  # type: ignore[arg-type]
        await collector.collect()
        if broken.calls < at:
            await finish()
        expected = 1 + (outcomes[-1] == "published")
        assert await whole(objects, registry) == expected
        await Collector(objects, BlobLeases(redis), NO_GRACE).collect()
        assert await whole(objects, registry) == expected
        assert len(await objects.list("tenants/t/blobs")) == expected, "and nothing stays"
    assert broken.calls < at, "every call has had its turn"
    assert set(outcomes) == ({"published", "refused"} if late else {"published"})


@pytest.mark.parametrize("after", [False, True])
async def test_a_collector_at_any_step_of_an_upload(objects: Objects, redis: Redis, *, after: bool) -> None:
    """Whose time is over from the beginning."""
    outcomes = []
    for at in range(1, 6):
        await redis.flushall()
        collector = Collector(objects, BlobLeases(redis), NO_GRACE)
        slow = Interrupted(objects, at, collector.collect, after=after)
        registry = Registry(slow, redis, grace_seconds=-1)  # type: ignore[arg-type]
        healthy = Registry(objects, redis)
        version = await healthy.next_version("t", "a")
        try:
            blobs = await stage(registry, "t")
            await registry.publish(manifest("t", "a", version, "d", blobs))
            outcomes.append("published")
        except StoreError:
            outcomes.append("refused")
        assert await whole(objects, healthy) == (outcomes[-1] == "published")
        if outcomes[-1] == "refused":
            assert not await objects.list("tenants/t/adapters"), "nor is half of it there"
            assert await publish(healthy, "t", "a") > version, "its number is used up"
        await healthy.delete("t", "a", purge=True)
        await collector.collect()
        assert await objects.list("tenants") == []
    assert slow.calls < at, "every call has had its turn"
    assert set(outcomes) == {"published", "refused"}


async def test_uploads_deletions_and_collectors_all_at_once(objects: Objects, redis: Redis) -> None:
    chance = random.Random(5)
    over = asyncio.Event()
    published: list[int] = []

    async def collect() -> None:
        collector = Collector(objects, BlobLeases(redis), NO_GRACE)
        while not over.is_set():
            if chance.random() < 0.5:
                await collector.collect()
            else:
                await collector.sweep()

    async def upload(name: str) -> None:
        registry = Registry(objects, redis, grace_seconds=0.02)
        for _ in range(12):
            blobs = await stage(registry, "t")
            await asyncio.sleep(chance.choice([0, 0.03, 0.06]))
            try:
                number = await registry.next_version("t", name)
                await registry.publish(manifest("t", name, number, "d", blobs))
                published.append(number)
                if number % 4 == 0:
                    await registry.delete("t", name, number, purge=True)
            except StoreError:
                continue

    collectors = [asyncio.create_task(collect()) for _ in range(3)]
    await asyncio.gather(*(upload(name) for name in "abcd"))
    over.set()
    await asyncio.gather(*collectors)
    assert published
    registry = Registry(objects, redis)
    await registry.finish_deletes()
    versions = await whole(objects, registry)
    await Collector(objects, BlobLeases(redis), NO_GRACE).collect()
    assert await whole(objects, registry) == versions
    assert len(await objects.list("tenants/t/blobs")) == versions


async def test_blobs_are_young_or_leased_or_gone(registry: Registry, objects: Objects, redis: Redis) -> None:
    blobs = await stage(registry, "t")
    await objects.put("tenants/t/blobs/stray", b"")
    staged = BlobLeases(redis)
    assert await Collector(objects, staged, NO_GRACE).sweep() == ([], 0, [])
    assert (await Collector(objects, staged, 3600).collect()).keys == [], "too young, whoever wrote it"
    dry = await Collector(objects, staged, NO_GRACE).collect(dry_run=True)
    assert (dry.keys, dry.bytes) == (["tenants/t/blobs/stray"], 0)
    assert await objects.list("tenants/t/blobs/stray") or await objects.head("tenants/t/blobs/stray")
    assert (await Collector(objects, staged, NO_GRACE).collect()).keys == dry.keys
    await expire(redis)
    assert (await Collector(objects, staged, 3600).sweep()).keys == []
    found = await Collector(objects, staged, NO_GRACE).sweep()
    assert (found.keys, found.bytes) == ([blobs[0].key], blobs[0].bytes)
    assert await redis.exists(STAGED) == 0


async def test_a_manifest_that_cannot_be_read_guards_its_tenants_blobs(
    registry: Registry, objects: Objects, redis: Redis
) -> None:
    await publish(registry, "t", "a")
    await publish(registry, "u", "a")
    for tenant in "tu":
        await stage(registry, tenant)
    await expire(redis)
    await objects.put(manifest_key("t", "a", 1), b"{")
    found = await Collector(objects, BlobLeases(redis), NO_GRACE).collect()
    assert (len(found.keys), found.unreadable) == (1, ["t"])
    assert [len(await objects.list(f"tenants/{tenant}/blobs")) for tenant in "tu"] == [2, 1]


def test_drafts_of_killed_writers_go_and_young_ones_stay(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    for name in ("a/blob#123", "a/blob", "a/young#1", "a/#x", "a/no#12x"):
        (tmp_path / name).write_bytes(b"")
        os.utime(tmp_path / name, (1, 1))
    os.utime(tmp_path / "a/young#1")
    url = tmp_path.as_uri()
    assert remove_stale_temp_files(url, 3600, dry_run=True) == ["a/blob#123"]
    assert (tmp_path / "a/blob#123").exists()
    assert remove_stale_temp_files(url, 3600) == ["a/blob#123"]
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["#x", "blob", "no#12x", "young#1"]
    assert remove_stale_temp_files("s3://bucket", 0) == []
