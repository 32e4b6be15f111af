"""Every call of a load fails once: the row gets an error, never other weights, and the next load succeeds."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from adapters_store.object_store.store import Objects
from server.adapters.loading.loader import Loader
from server.engine.engine import Engine
from server.errors import StoreError
from server.settings import Settings
from tests.fixtures.engine import publish
from tests.fixtures.faults import StoreFaults
from tests.fixtures.models import make_lora
from tests.fixtures.proxy import proxy
from tests.fixtures.s3 import Weed

LONG = 60


@pytest.fixture(scope="module")
def model(tiny_models: Callable[[str], Path]) -> Path:
    return tiny_models("llama")


@pytest.fixture(scope="module")
def folder(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_lora(model, tmp_path_factory.mktemp("loras") / "plain", target_modules=["q_proj"], r=4)


@pytest.fixture(params=["file", "s3"])
def engine(request: pytest.FixtureRequest, model: Path, tmp_path: Path) -> Iterator[Engine]:
    given: dict[str, Any] = {}
    if request.param == "s3":
        weed: Weed = request.getfixturevalue("weed")
        given = {"store": weed.url(), "store_config": weed.config}
    settings = Settings(model=str(model), data_dir=tmp_path, kv_bytes=1 << 20, threads=1, **given)
    engine = Engine(settings, model)
    yield engine
    engine.close()


def settled(loader: Loader) -> None:
    """Loads have left nothing to do: what is reserved is what is held."""
    end = time.monotonic() + LONG
    while loader.ram.nbytes != sum(
        held.item.nbytes for held in loader.ram.index.entries.values() if held.item
    ):
        assert time.monotonic() < end
        time.sleep(0.001)


def test_a_load_whose_kth_call_fails(engine: Engine, folder: Path, store_faults: StoreFaults) -> None:
    loader = engine.loader
    ref = publish(loader.objects, engine.base, folder)
    (sha256,) = (key.rsplit("/", 1)[1] for key in loader.objects.list_sync("tenants") if "/blobs/" in key)
    right = loader.fetch(ref).result(LONG).flat
    for _ in store_faults.each():
        settled(loader)  # a copy that comes onto disk later would spare the store's calls
        loader.ram.drop(ref.digest)
        loader.disk.drop(sha256)
        found = loader.fetch(ref)
        if error := found.exception(LONG):
            assert isinstance(error, StoreError)
        else:
            assert torch.equal(found.result().flat, right)
        with store_faults.paused():
            assert torch.equal(loader.fetch(ref).result(LONG).flat, right), "the request after it"
    assert store_faults.met >= 4  # manifest and weights: each before and after


@pytest.mark.parametrize("damage", ["flipped", "truncated", "longer", "gone"])
def test_damage_in_the_store_itself_is_never_served(engine: Engine, folder: Path, damage: str) -> None:
    loader = engine.loader
    ref = publish(loader.objects, engine.base, folder)
    (key,) = (key for key in loader.objects.list_sync("tenants") if "/blobs/" in key)
    good = loader.objects.get_sync(key)
    changed = {
        "flipped": good[:-9] + bytes([good[-9] ^ 1]) + good[-8:],
        "truncated": good[:-1],
        "longer": good + b"\0",
    }
    loader.objects.delete_sync(key)
    if damage in changed:
        loader.objects.put_sync(key, changed[damage])
    for _ in range(2):
        assert isinstance(loader.fetch(ref).exception(LONG), StoreError)
    assert list(loader.disk.folder.iterdir()) == []
    loader.objects.put_sync(key, good)
    assert loader.fetch(ref).result(LONG).nbytes > 0


def test_damage_on_the_way_from_the_store_is_never_served(
    model: Path, folder: Path, tmp_path: Path, weed: Weed
) -> None:
    with proxy(weed.endpoint) as (network, endpoint):
        settings = Settings(model=str(model), data_dir=tmp_path, kv_bytes=1 << 20, threads=1)
        engine = Engine(settings, model)
        engine.loader.objects = Objects.open(weed.url(), options=weed.options(endpoint))
        ref = publish(engine.loader.objects, engine.base, folder)
        network.method = "GET"
        network.fates.extend(["pass", "flip", "flip"])  # the manifest, the weights, and once more
        assert isinstance(engine.loader.fetch(ref).exception(LONG), StoreError)
        assert [fate for method, _, fate in network.seen if method == "GET"][-3:] == ["pass", "flip", "flip"]
        network.fates.extend(["pass", "flip"])  # then they come as they are
        assert engine.loader.fetch(ref).result(LONG).nbytes > 0
        assert engine.loader.corrupt_copies["store"] == 3
        engine.close()
