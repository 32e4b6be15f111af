"""/admin: garbage, verification, uploads for a tenant, with the operator's key only; the watched prefix."""

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.api.adapters.bucket_watcher import WATCHED, BucketWatcher
from server.api.services import Services
from server.engine.fake import FakeEngine
from server.errors import StartupError
from tests.server.api.conftest import System, lora_config, lora_files, upload

PREFIX = "drop"


@pytest.fixture
def operator(system: System, engine: FakeEngine) -> Iterator[httpx.Client]:
    with system.http(system.operator) as client:
        yield client


@pytest.fixture
def tenant(operator: httpx.Client) -> dict[str, str]:
    made: dict[str, str] = operator.post("/admin/tenants", json={"name": "fresh"}).json()
    return made


@pytest.fixture
def http(system: System, tenant: dict[str, str]) -> Iterator[httpx.Client]:
    with system.http(tenant["key"]) as client:
        yield client


def steps(client: httpx.Client) -> list[dict[str, Any]]:
    lines = client.post("/admin/verify").text.splitlines()
    data = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
    assert data.pop() == "[DONE]"
    return [json.loads(line) for line in data]


def findings(client: httpx.Client, tenant: str) -> set[tuple[str, str | None, bool]]:
    """kind, version, fault: of this tenant."""
    found = [finding for step in steps(client) for finding in step["findings"]]
    return {(f["kind"], f["version"], f["fault"]) for f in found if f"/{tenant}/" in f["key"]}


def test_only_the_operator(http: httpx.Client, tenant: dict[str, str]) -> None:
    for path in ("gc", "verify", "rebuild-index", f"tenants/{tenant['id']}/adapters"):
        assert http.post(f"/admin/{path}", json={}).status_code == 403


def test_verify_finds_what_is_wrong(
    operator: httpx.Client, http: httpx.Client, system: System, tenant: dict[str, str]
) -> None:
    objects, id_ = system.app.state.services.objects, tenant["id"]
    for name in ("whole", "cut", "flipped", "lost", "deleted", "garbled"):
        upload(http, name)
    http.delete("/v1/adapters/deleted")
    assert findings(operator, id_) == set()
    last = steps(operator)[-1]
    assert last["done"] == last["total"] >= 18

    weights = {
        name: next(
            f["key"]
            for f in json.loads(objects.get_sync(f"tenants/{id_}/adapters/{name}/00000001.json"))["files"]
            if f["name"].endswith(".safetensors")
        )
        for name in ("cut", "flipped", "deleted")
    }
    objects.put_sync(weights["cut"], objects.get_sync(weights["cut"])[:-1])
    raw = bytearray(objects.get_sync(weights["flipped"]))
    raw[-1] ^= 1
    objects.put_sync(weights["flipped"], bytes(raw))
    objects.delete_sync(weights["deleted"])
    objects.put_sync(f"tenants/{id_}/blobs/stray", b"x")
    manifest = objects.get_sync(f"tenants/{id_}/adapters/whole/00000001.json")
    objects.create_sync(
        f"tenants/{id_}/adapters/whole/00000002.json", manifest.replace(b'"version": 1', b'"version": 2')
    )
    objects.put_sync(f"tenants/{id_}/adapters/garbled/00000001.json", b"{")
    objects.delete_sync(f"tenants/{id_}/adapters/lost/00000001.json")
    assert findings(operator, id_) == {
        ("corrupt", f"{id_}/cut@1", True),
        ("corrupt", f"{id_}/flipped@1", True),
        ("missing", f"{id_}/deleted@1", True),
        ("missing", f"{id_}/lost@1", True),
        ("corrupt", f"{id_}/garbled@1", True),
        ("unindexed", f"{id_}/whole@2", False),
        ("unreferenced", None, False),
    }
    for key in objects.list_sync(f"tenants/{id_}"):  # the next test's verify shall find a whole store
        objects.delete_sync(key)
    operator.post("/admin/rebuild-index")


def test_gc_says_or_does(
    operator: httpx.Client, http: httpx.Client, system: System, tenant: dict[str, str]
) -> None:
    objects, collector = (
        system.app.state.services.objects,
        system.app.state.services.registry.collector,
    )
    upload(http, "kept")
    stray = f"tenants/{tenant['id']}/blobs/stray"
    objects.put_sync(stray, b"xyz")
    young = operator.post("/admin/gc", json={}).json()
    assert stray not in young["keys"], "too young to be garbage"
    grace, collector._grace = collector._grace, -1
    try:
        dry = operator.post("/admin/gc", json={"dry_run": True}).json()
        assert (stray in dry["keys"], dry["dry_run"]) == (True, True)
        assert objects.get_sync(stray) == b"xyz"
        done = operator.post("/admin/gc", json={}).json()
    finally:
        collector._grace = grace
    assert (done["keys"], done["blobs"], done["bytes"]) == (dry["keys"], dry["blobs"], dry["bytes"])
    assert stray not in objects.list_sync(f"tenants/{tenant['id']}")
    assert http.get("/v1/adapters/kept/versions/1/download").status_code == 200
    for body, status in (({"dry_run": "yes"}, 400), ({"wet_run": True}, 400)):
        assert operator.post("/admin/gc", json=body).status_code == status


def test_the_operator_uploads_for_a_tenant(
    operator: httpx.Client, http: httpx.Client, tenant: dict[str, str]
) -> None:
    path = f"/admin/tenants/{tenant['id']}/adapters"
    made = operator.post(path, data={"name": "theirs"}, files=lora_files())
    assert (made.status_code, made.json()["version"]) == (201, 1)
    (change,) = http.get("/v1/adapters/theirs/history").json()["data"]
    assert change["actor"] == "operator"
    assert operator.get("/v1/adapters/theirs").status_code == 404
    nobody = operator.post("/admin/tenants/ten_nobody/adapters", data={"name": "x"}, files=lora_files())
    assert nobody.status_code == 404


class Drop:
    """A watcher that looks when it is told, and a team that copies files."""

    def __init__(self, system: System, tenant: str) -> None:
        self.system, self.deps = system, system.app.state.services
        self.watcher = BucketWatcher(self.deps, PREFIX)
        self.tenant = tenant

    def look(self, times: int = 1) -> None:
        for _ in range(times):
            self.system.call(self.watcher.poll())

    def put(self, file: str, data: bytes, name: str = "poet") -> None:
        self.deps.objects.put_sync(f"{PREFIX}/{self.tenant}/{name}/{file}", data)

    def copy(self, seed: int = 0, name: str = "poet", **config: Any) -> None:
        for _, (file, data, _) in lora_files(seed, **config):
            self.put(file, data, name)


@pytest.fixture
def drop(system: System, tenant: dict[str, str]) -> Iterator[Drop]:
    drop = Drop(system, tenant["id"])
    yield drop
    objects = system.app.state.services.objects
    for key in objects.list_sync(PREFIX):
        objects.delete_sync(key)
    system.call(_flush(drop.deps))


async def _flush(parts: Services) -> None:
    await parts.redis.delete(WATCHED)


def versions(client: httpx.Client, name: str = "poet") -> list[int]:
    return [v["version"] for v in client.get(f"/v1/adapters/{name}").json().get("versions", [])]


def test_what_is_copied_is_published_once_it_stays_the_same(drop: Drop, http: httpx.Client) -> None:
    files = {name: data for _, (name, data, _) in lora_files()}
    drop.put("adapter_model.safetensors", files["adapter_model.safetensors"][:100])
    drop.look(2)
    drop.put("adapter_config.json", files["adapter_config.json"])
    drop.look()
    drop.put("adapter_model.safetensors", files["adapter_model.safetensors"])
    drop.look()
    assert versions(http) == [], "it was still changing"
    drop.look(3)
    assert versions(http) == [1]
    (change,) = http.get("/v1/adapters/poet/history").json()["data"]
    assert change["actor"] == "watch"
    drop.copy()  # the same bytes again
    drop.look(3)
    assert versions(http) == [1]
    drop.copy(seed=1)
    drop.look(3)
    assert versions(http) == [1, 2]


def test_a_marker_saves_the_second_look(drop: Drop, http: httpx.Client) -> None:
    drop.copy()
    drop.put("READY", b"")
    drop.look()
    assert versions(http) == [1]


def test_a_watcher_that_died_before_it_said_so_publishes_nothing_twice(
    drop: Drop, http: httpx.Client
) -> None:
    drop.copy()
    drop.look(2)
    drop.system.call(_flush(drop.deps))
    drop.look(2)
    assert versions(http) == [1]


def test_what_is_refused_is_said_once_and_waits_for_a_change(
    drop: Drop, http: httpx.Client, caplog: pytest.LogCaptureFixture
) -> None:
    drop.copy(peft_type="ADALORA")
    drop.copy(name="toy")  # the base's own name
    drop.look(5)
    said = [record.getMessage() for record in caplog.records if "refused" in record.getMessage()]
    assert sorted(line.partition(" is refused")[0].rpartition("/")[2] for line in said) == ["poet", "toy"]
    assert any("ADALORA" in line for line in said)
    drop.copy()
    drop.look(3)
    assert versions(http) == [1]


def test_nobodys_folder_and_strange_names_do_no_harm(
    drop: Drop, http: httpx.Client, engine: FakeEngine
) -> None:
    nobody = Drop(drop.system, "ten_nobody")
    nobody.copy()
    for key in ("x", "ten/adapter_config.json", "a/b/c/adapter_config.json", "..x/y/adapter_config.json"):
        drop.deps.objects.put_sync(f"{PREFIX}/{key}", b"{}")
    drop.copy()
    drop.look(3)
    assert versions(http) == [1]
    assert len(engine.checked) == 1


def test_an_engine_that_is_away_is_waited_for(drop: Drop, http: httpx.Client, engine: FakeEngine) -> None:
    engine.behaviour.refuse = ("unavailable", "The engine is busy.", None)
    drop.copy()
    drop.look(3)
    engine.behaviour.refuse = None
    drop.look()
    assert versions(http) == [1]


def test_an_adapter_that_kills_the_engine_is_given_up(
    drop: Drop, http: httpx.Client, engine: FakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    engine.behaviour.refuse = ("engine_lost", "The engine stopped.", None)
    drop.copy()
    drop.look(9)
    assert len(engine.checked) == 3
    assert sum("is refused" in record.getMessage() for record in caplog.records) == 1
    engine.behaviour.refuse = None
    drop.look(2)
    assert versions(http) == []


def test_two_watchers_publish_it_once(drop: Drop, http: httpx.Client) -> None:
    others = [BucketWatcher(drop.deps, PREFIX) for _ in range(3)]
    drop.copy()

    async def together() -> None:
        for _ in range(3):
            await asyncio.gather(*(watcher.poll() for watcher in [drop.watcher, *others]))

    drop.system.call(together())
    assert versions(http) == [1]


def test_the_prefix_is_not_where_adapters_are_kept(system: System) -> None:
    with pytest.raises(StartupError, match="tenants"):
        BucketWatcher(system.app.state.services, "tenants/drop")


def test_too_large_a_copy_is_not_fetched(
    drop: Drop, http: httpx.Client, caplog: pytest.LogCaptureFixture
) -> None:
    drop.put("adapter_config.json", json.dumps(lora_config()).encode())
    drop.put("adapter_model.safetensors", b"\0" * ((1 << 20) + 1))
    drop.look(4)
    assert sum("more than" in record.getMessage() for record in caplog.records) == 1
    assert not [*(Path(drop.deps.settings.data_dir) / "incoming").iterdir()]
