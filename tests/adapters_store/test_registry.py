import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from redis.asyncio import Redis

from adapters_store.manifest import Blob, Manifest
from adapters_store.names import manifest_key
from adapters_store.object_store.store import Objects
from adapters_store.registry.registry import Registry
from server.errors import Conflict, InvalidField, NotFound, PolypeftError, QuotaExceeded, StoreError
from tests.fixtures.faults import Failing
from tests.fixtures.services import held_to

pytestmark = pytest.mark.anyio
WEIGHTS = "adapter_model.safetensors"
SIZE = Path(__file__).stat().st_size  # of what `stage` stores


def manifest(
    tenant: str,
    name: str,
    version: int,
    digest: str = "d",
    blobs: list[Blob] | None = None,
    *,
    promoted: bool = True,
) -> Manifest:
    return Manifest(
        tenant=tenant,
        name=name,
        version=version,
        method="lora",
        base="b",
        base_digest="b",
        digest=digest,
        files=blobs or [Blob(name=WEIGHTS, key="tenants/t/blobs/nowhere", sha256="0" * 64, bytes=10)],
        config={},
        tensors={},
        facts={"rank": 8},
        created=1,
        promoted=promoted,
    )


async def publish(registry: Registry, tenant: str, name: str, digest: str = "d") -> int:
    version = await registry.next_version(tenant, name)
    await registry.publish(manifest(tenant, name, version, digest, await stage(registry, tenant)))
    return version


async def stage(registry: Registry, tenant: str) -> list[Blob]:
    return await registry.stage(tenant, [(WEIGHTS, Path(__file__))])


async def test_versions_count_up_and_latest_follows(registry: Registry) -> None:
    assert [await publish(registry, "t", "a", f"d{i}") for i in range(3)] == [1, 2, 3]
    adapter = await registry.get("t", "a")
    assert [v.version for v in adapter.versions] == [1, 2, 3]
    assert adapter.latest.digest == "d2"
    assert adapter.aliases == {"latest": 3}
    selectors = [None, "latest", "3", "v3", "1", "v2"]
    assert [(await registry.resolve("t", "a", s)).version for s in selectors] == [3, 3, 3, 3, 1, 2]
    assert (await registry.manifest("t", "a", 2)).digest == "d1"
    assert (await registry.resolve("t", "a")).rank == 8


async def test_unknown_and_foreign_are_one_answer(registry: Registry) -> None:
    await publish(registry, "owner", "a")
    calls: list[Callable[[str, str], Awaitable[object]]] = [
        registry.get,
        registry.resolve,
        registry.delete,
        registry.history,
        lambda t, n: registry.resolve(t, n, "1"),
        lambda t, n: registry.manifest(t, n, 1),
        lambda t, n: registry.aliases.get(t, n, "latest"),
        lambda t, n: registry.aliases.set(t, n, "prod", 1),
        lambda t, n: registry.aliases.unset(t, n, "latest"),
        lambda t, n: registry.aliases.rollback(t, n, "latest"),
    ]
    for call in calls:
        answers = set()
        for tenant, name in [("other", "a"), ("owner", "b"), ("other", "b")]:
            with pytest.raises(NotFound) as caught:
                await call(tenant, name)
            error = caught.value
            answers.add((error.code, error.param, error.message.replace(f"'{name}", "'N"), error.status))
        assert len(answers) == 1
        assert caught.value.code == "model_not_found"
    assert await registry.list("other") == []


@pytest.mark.parametrize("selector", ["", "0", "2", "prod", "../1", "v", "-1", "1" * 20, "\x00", "x" * 5000])
async def test_unknown_selectors_are_not_found(registry: Registry, selector: str) -> None:
    await publish(registry, "t", "a")
    with pytest.raises(NotFound) as caught:
        await registry.resolve("t", "a", selector)
    assert len(caught.value.message) < 200


async def test_fifty_uploads_of_one_version_make_one(registry: Registry) -> None:
    version = await registry.next_version("t", "a")
    ready = [manifest("t", "a", version, f"d{i}", await stage(registry, "t")) for i in range(50)]
    outcomes = await asyncio.gather(*map(registry.publish, ready), return_exceptions=True)
    assert outcomes.count(None) == 1
    assert sum(isinstance(outcome, Conflict) for outcome in outcomes) == 49
    assert (await registry.resolve("t", "a")).digest == f"d{outcomes.index(None)}"


async def test_aliases(registry: Registry) -> None:
    await publish(registry, "t", "a")
    await publish(registry, "t", "a")
    await registry.aliases.set("t", "a", "prod", 1)
    assert (await registry.resolve("t", "a", "prod")).version == 1
    await registry.aliases.set("t", "a", "prod", 2)
    assert (await registry.resolve("t", "a", "prod")).version == 2
    with pytest.raises(NotFound):
        await registry.aliases.set("t", "a", "prod", 3)


async def test_deleting_a_version_moves_latest_and_drops_its_aliases(
    registry: Registry, objects: Objects
) -> None:
    for digest in ("d1", "d2"):
        await publish(registry, "t", "a", digest)
    await registry.aliases.set("t", "a", "prod", 2)
    assert await registry.delete("t", "a", 2, purge=True) == ["d2"]
    assert (await registry.get("t", "a")).aliases == {"latest": 1}
    assert await objects.list("tenants/t/adapters") == [manifest_key("t", "a", 1)]
    assert len(await objects.list("tenants/t/blobs")) == 1
    assert await publish(registry, "t", "a") == 3, "a number is never used again"


async def test_deleting_an_adapter(registry: Registry, objects: Objects) -> None:
    for digest in ("d1", "d2"):
        await publish(registry, "t", "a", digest)
    assert sorted(await registry.delete("t", "a", purge=True)) == ["d1", "d2"]
    for call in (registry.get, registry.resolve, registry.delete):
        with pytest.raises(NotFound):
            await call("t", "a")
    assert await registry.list("t") == []
    assert await objects.list("tenants/t") == []
    assert await publish(registry, "t", "a") == 3


async def test_lists_page_by_name(registry: Registry) -> None:
    for name in ["b", "a", "C", "a-1", "a.b"]:
        await publish(registry, "t", name)
    first = await registry.list("t", limit=2)
    rest = await registry.list("t", after=first[-1].name)
    assert [a.name for a in first + rest] == ["C", "a", "a-1", "a.b", "b"]


async def test_quota_counts_names_not_versions(objects: Objects, redis: Redis) -> None:
    registry = Registry(objects, redis, held_to(adapters=2))
    for name in ("a", "b", "a"):
        await publish(registry, "t", name)
    with pytest.raises(QuotaExceeded, match="2"):
        await registry.next_version("t", "c")
    with pytest.raises(QuotaExceeded):
        await registry.publish(manifest("t", "c", 1))
    assert await objects.list("tenants/t/adapters/c") == []
    await publish(registry, "u", "c")
    await registry.delete("t", "a")
    await publish(registry, "t", "c")


async def test_bytes_of_all_versions_are_bounded_deleted_ones_included(
    objects: Objects, redis: Redis
) -> None:
    registry = Registry(objects, redis, held_to(adapter_bytes=3 * SIZE))
    for name in ("a", "a", "b"):
        await publish(registry, "t", name)
    with pytest.raises(QuotaExceeded, match=f"{3 * SIZE} bytes"):
        await registry.next_version("t", "b", SIZE)
    with pytest.raises(QuotaExceeded):
        await publish(registry, "t", "b")
    assert await objects.list("tenants/t/adapters/b") == [manifest_key("t", "b", 1)]
    await publish(registry, "u", "b")
    await registry.delete("t", "a", 1)
    with pytest.raises(QuotaExceeded):
        await publish(registry, "t", "b")
    await registry.restore("t", "a")
    await registry.delete("t", "b", purge=True)
    await publish(registry, "t", "c")
    with pytest.raises(QuotaExceeded):
        await publish(registry, "t", "c")
    await registry.delete("t", "a")
    await registry.delete("t", "a", purge=True)
    assert [await publish(registry, "t", "c") for _ in "12"] == [3, 4], "room for the two that were purged"


async def test_bytes_are_counted_where_an_earlier_version_did_not(objects: Objects, redis: Redis) -> None:
    before = Registry(objects, redis)
    for name in ("a", "b", "b"):
        await publish(before, "t", name)
    await before.delete("t", "a")
    for rebuilt in (False, True):
        await (before.rebuild_index() if rebuilt else redis.delete("pp:adapters:t:bytes"))
        with pytest.raises(QuotaExceeded):
            await publish(Registry(objects, redis, held_to(adapter_bytes=4 * SIZE - 1)), "t", "b")
        assert await redis.get("pp:adapters:t:bytes") == b"%d" % (3 * SIZE)
    await redis.delete("pp:adapters:t:bytes")
    await before.delete("t", "a", purge=True)
    await publish(Registry(objects, redis, held_to(adapter_bytes=3 * SIZE)), "t", "b")


async def test_of_many_at_once_no_more_bytes_are_taken_than_may_be(objects: Objects, redis: Redis) -> None:
    registry = Registry(objects, redis, held_to(adapter_bytes=3 * SIZE))
    names = [f"a{number}" for number in range(8)]
    done = await asyncio.gather(*(publish(registry, "t", name) for name in names), return_exceptions=True)
    assert sum(not isinstance(one, BaseException) for one in done) == 3
    assert sum(isinstance(one, QuotaExceeded) for one in done) == 5


async def test_what_a_refused_upload_stored_is_discarded_and_what_a_version_has_is_not(
    objects: Objects, registry: Registry
) -> None:
    await publish(registry, "t", "a")
    kept = (await registry.manifest("t", "a", 1)).files
    refused = await registry.stage("t", [("adapter_model.safetensors", Path(__file__))])
    await registry.collector.discard([blob.key for blob in [*kept, *refused]])
    assert await objects.list("tenants/t/blobs") == [blob.key for blob in kept]


async def test_versions_and_aliases_are_bounded(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adapters_store.registry.registry.MAX_VERSIONS", 2)
    monkeypatch.setattr("adapters_store.registry.aliases.MAX_ALIASES", 2)
    await publish(registry, "t", "a")
    await publish(registry, "t", "a")
    with pytest.raises(QuotaExceeded, match="2 versions"):
        await registry.next_version("t", "a")
    await registry.aliases.set("t", "a", "prod", 1)
    await registry.aliases.set("t", "a", "prod", 2)
    with pytest.raises(QuotaExceeded, match="2 aliases"):
        await registry.aliases.set("t", "a", "test", 1)
    await registry.delete("t", "a", 1)
    assert await registry.next_version("t", "a") == 3


async def test_stage_stores_by_content_under_the_tenant(
    registry: Registry, objects: Objects, tmp_path: Path
) -> None:
    (tmp_path / "f").write_bytes(b"bytes")
    (blob,) = await registry.stage("t", [("adapter_model.safetensors", tmp_path / "f")])
    assert blob.bytes == 5
    (again,) = await registry.stage("t", [("adapter_model.safetensors", tmp_path / "f")])
    assert again.sha256 == blob.sha256
    assert again.key != blob.key, "one key, two uploads: whoever removes the first takes the second's"
    assert blob.key.startswith(f"tenants/t/blobs/{blob.sha256}.")
    assert await objects.get(blob.key) == b"bytes"
    for name in ["../x", "a/b", "", "a\x00", "\\", "x" * 129]:
        with pytest.raises(InvalidField, match="file name"):
            await registry.stage("t", [(name, tmp_path / "f")])


@pytest.mark.parametrize("after", [False, True])
async def test_a_store_that_fails_at_any_call_leaves_old_or_new(
    objects: Objects, redis: Redis, tmp_path: Path, after: bool
) -> None:
    """upload, upload, delete: whatever breaks, versions are whole or absent, and the next upload works."""
    (tmp_path / "f").write_bytes(b"bytes")
    for at in range(1, 13):
        await redis.flushall()
        for key in await objects.list("tenants"):
            await objects.delete(key)
        failing = Failing(objects, at, after=after)
        broken = Registry(failing, redis)  # type: ignore[arg-type]
        errors = []
        for step in ("one", "two", "delete"):
            try:
                if step == "delete":
                    await broken.delete("t", "a", 1)
                else:
                    await broken.stage("t", [("f", tmp_path / "f")])
                    await publish(broken, "t", "a", step)
            except PolypeftError as error:
                errors.append(error)
        healthy = Registry(objects, redis)
        for adapter in await healthy.list("t"):
            for version in adapter.versions:
                assert (await healthy.manifest("t", "a", version.version)).digest == version.digest
        try:
            await publish(healthy, "t", "a", "three")
        except Conflict:  # the orphan of a lost answer is indexed now: one more try is enough
            await publish(healthy, "t", "a", "three")
        assert (await healthy.resolve("t", "a")).digest == "three"
        await healthy.delete("t", "a", purge=True)
        for key in await objects.list("tenants/t/adapters"):  # left by who could not take it back
            with pytest.raises(NotFound):
                await healthy.resolve("t", "a", str(int(key[-13:-5])))
            await objects.delete(key)
        await Registry(objects, redis, grace_seconds=-1).collector.collect()
        await redis.delete("pp:staged")  # as if all leases had run out
        await Registry(objects, redis, grace_seconds=-1).collector.collect()
        assert await objects.list("tenants") == []
    assert failing.calls < at, "every call has had its turn to fail"


async def test_the_index_can_be_rebuilt_and_keeps_aliases(
    registry: Registry, objects: Objects, redis: Redis
) -> None:
    for tenant, name in [("t", "a"), ("t", "a"), ("u", "a"), ("u", "b")]:
        await publish(registry, tenant, name, f"{tenant}{name}")
    await registry.aliases.set("t", "a", "prod", 1)
    before = [await registry.list(tenant) for tenant in ("t", "u")]
    await registry.rebuild_index()
    assert [await registry.list(tenant) for tenant in ("t", "u")] == before
    await objects.delete(manifest_key("u", "b", 1))
    await redis.delete("pp:adapters:t", "pp:adapter:t:a:versions", "pp:adapters:t:last")
    assert await registry.rebuild_index() == 3
    (found,) = await registry.list("t")
    assert (found.versions, found.aliases) == (before[0][0].versions, {"latest": 2, "prod": 1})
    assert [a.name for a in await registry.list("u")] == ["a"]
    assert await publish(registry, "t", "a") == 3


async def test_valkey_down_is_a_store_error(objects: Objects) -> None:
    from adapters_store.valkey import connect

    nobody = connect("unix:///nonexistent/v.sock")
    with pytest.raises(StoreError):
        await Registry(objects, nobody).resolve("t", "a")
    await nobody.aclose()
