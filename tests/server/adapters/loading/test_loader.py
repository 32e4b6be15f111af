"""The path from the store to RAM, on a real store and a real tiny model's engine."""

import errno
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from safetensors.torch import load_file, save_file

from adapters_store.manifest import decode_manifest
from adapters_store.object_store.store import Objects
from server.engine.engine import Engine
from server.errors import InvalidAdapter, NotFound, PolypeftError, StoreError
from server.messages import AdapterRef
from server.settings import Settings
from tests.fixtures.engine import publish
from tests.fixtures.models import make_lora
from tests.waiting import until

LONG = 60


@pytest.fixture(scope="module")
def model(tiny_models: Callable[[str], Path]) -> Path:
    return tiny_models("llama")


@pytest.fixture(scope="module")
def folder(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_lora(
        model, tmp_path_factory.mktemp("loras") / "plain", target_modules=["q_proj", "v_proj"], r=4
    )


@pytest.fixture
def engine(model: Path, tmp_path: Path) -> Iterator[Engine]:
    settings = Settings(model=str(model), data_dir=tmp_path, kv_bytes=1 << 20, threads=1)
    engine = Engine(settings, model)
    engine.loader.copies_to_disk = True  # as if the store lay on another disk
    yield engine
    engine.close()


def tiers(engine: Engine) -> list[str]:
    """Where each load since the last call came from."""
    return [tier for name, tier, _ in engine.take_observations() if name == "adapter_load_seconds"]


def copies(engine: Engine) -> list[Path]:
    """What is on disk once there is something to read: it is written behind the load."""
    disk = engine.loader.disk
    until(lambda: any(not entry.references for entry in list(disk.index.entries.values())))
    return list(disk.folder.iterdir())


def failure(engine: Engine, ref: AdapterRef) -> PolypeftError:
    error = engine.loader.fetch(ref).exception(LONG)
    assert isinstance(error, PolypeftError)
    return error


def test_what_lies_on_the_same_disk_is_not_copied(model: Path, folder: Path, tmp_path: Path) -> None:
    engine = Engine(Settings(model=str(model), data_dir=tmp_path, kv_bytes=1 << 20, threads=1), model)
    assert not engine.loader.copies_to_disk
    ref = publish(engine.loader.objects, engine.base, folder)
    engine.loader.fetch(ref).result(LONG)
    until(lambda: len(engine.loader.ram) == 1 and engine.loader.ram.nbytes < 64 << 10)  # its load has ended
    assert len(engine.loader.disk) == 0
    engine.close()


def test_each_tier_spares_the_one_below(engine: Engine, folder: Path) -> None:
    ref = publish(engine.loader.objects, engine.base, folder)
    packed = engine.loader.fetch(ref).result(LONG)
    assert engine.loader.fetch(ref).result(LONG) is packed
    copies(engine)
    engine.loader.ram.drop(ref.digest)
    again = engine.loader.fetch(ref).result(LONG)
    assert torch.equal(again.flat, packed.flat)
    assert tiers(engine) == ["store", "ram", "disk"]
    until(lambda: engine.loader.ram.nbytes == packed.nbytes)


def test_many_ask_at_once_and_one_load_runs(engine: Engine, folder: Path) -> None:
    ref = publish(engine.loader.objects, engine.base, folder)
    start, futures = threading.Barrier(8), []

    def ask() -> None:
        start.wait()
        futures.append(engine.loader.fetch(ref))

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({id(future.result(LONG)) for future in futures}) == 1
    assert tiers(engine).count("store") == 1


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty"])
def test_a_damaged_disk_copy_is_counted_and_fetched_again(engine: Engine, folder: Path, damage: str) -> None:
    ref = publish(engine.loader.objects, engine.base, folder)
    packed = engine.loader.fetch(ref).result(LONG)
    engine.loader.ram.drop(ref.digest)
    (path,) = copies(engine)
    data = path.read_bytes()
    middle = len(data) // 2
    flipped = data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
    path.write_bytes({"flip": flipped, "truncate": data[:-1], "empty": b""}[damage])
    engine.take_observations()
    assert torch.equal(engine.loader.fetch(ref).result(LONG).flat, packed.flat)
    assert {tier: n for tier, n in engine.loader.corrupt_copies.items() if n} == {"disk": 1}
    (path,) = copies(engine)
    assert path.read_bytes() == data


def test_a_damaged_blob_in_the_store_never_serves(engine: Engine, folder: Path) -> None:
    ref = publish(engine.loader.objects, engine.base, folder)
    manifest = decode_manifest(engine.loader.objects.get_sync(ref.manifest_key))
    data = bytearray(engine.loader.objects.get_sync(manifest.weights.key))
    data[-1] ^= 1
    engine.loader.objects.put_sync(manifest.weights.key, bytes(data))
    assert isinstance(failure(engine, ref), StoreError)
    assert list(engine.loader.disk.folder.iterdir()) == []
    assert engine.loader.corrupt_copies["store"] == 2  # it was asked for once more
    assert engine.loader.ram.nbytes == 0


def test_bytes_changed_on_their_way_are_asked_for_again(
    engine: Engine, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ref = publish(engine.loader.objects, engine.base, folder)
    whole, calls = engine.loader.objects.read_sync, 0

    def once_wrong(key: str, buffer: memoryview, sha256: str) -> None:
        nonlocal calls
        calls += 1
        whole(key, buffer, sha256 if calls > 1 else "0" * 64)

    monkeypatch.setattr(engine.loader.objects, "read_sync", once_wrong)
    assert engine.loader.fetch(ref).result(LONG).intact()
    assert engine.loader.corrupt_copies["store"] == 1


def test_a_byte_flipped_in_ram_never_serves(engine: Engine, folder: Path) -> None:
    """Nor one that flips in a slot: it is found when the adapter goes into use again."""
    ref = publish(engine.loader.objects, engine.base, folder)
    packed = engine.loader.fetch(ref).result(LONG)
    want = packed.flat.clone()
    for tier in ("ram", "device", "device"):
        engine.loader.ram.get(ref.digest).flat.view(torch.uint8)[-1] ^= 1  # type: ignore[union-attr]
        slot = None
        while slot is None:
            slot = engine.cache.acquire(ref)
        resident = engine.cache.by_slot[slot]
        assert torch.equal(resident.packed.flat, want)
        engine.cache.release(slot)
        assert engine.loader.corrupt_copies[tier] > 0
    assert engine.loader.corrupt_copies["device"] == 2
    assert engine.loader.corrupt_copies["ram"] == 1


def test_a_full_disk_serves_all_the_same(
    engine: Engine, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.loader.objects = Objects.open("memory://")
    ref = publish(engine.loader.objects, engine.base, folder)

    def full(_path: Path, *_args: Any, **_more: Any) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "open", full)
    assert engine.loader.fetch(ref).result(LONG).nbytes > 0
    until(lambda: engine.loader.disk.failures == 1)
    assert list(engine.loader.disk.folder.iterdir()) == []


def test_every_byte_of_a_load_is_reserved(engine: Engine, folder: Path) -> None:
    ref = publish(engine.loader.objects, engine.base, folder)
    engine.loader.ram.index.policy.max_bytes = 1000
    assert "bytes of host memory" in failure(engine, ref).message
    assert engine.loader.ram.nbytes == 0


def test_a_changed_manifest_never_serves(engine: Engine, folder: Path) -> None:
    ref = publish(engine.loader.objects, engine.base, folder)
    data = engine.loader.objects.get_sync(ref.manifest_key)
    engine.loader.objects.put_sync(ref.manifest_key, data.replace(b'"lora_alpha": 8', b'"lora_alpha": 9'))
    assert b'"lora_alpha": 9' in engine.loader.objects.get_sync(ref.manifest_key)
    assert isinstance(failure(engine, ref), StoreError)


def test_a_deleted_version_is_an_unknown_model(engine: Engine, folder: Path) -> None:
    ref = publish(engine.loader.objects, engine.base, folder)
    engine.loader.objects.delete_sync(ref.manifest_key)
    error = failure(engine, ref)
    assert isinstance(error, NotFound)
    assert error.code == "model_not_found"


def test_missing_weights_are_damage_and_no_unknown_model(engine: Engine, folder: Path) -> None:
    ref = publish(engine.loader.objects, engine.base, folder)
    manifest = decode_manifest(engine.loader.objects.get_sync(ref.manifest_key))
    engine.loader.objects.delete_sync(manifest.weights.key)
    assert isinstance(failure(engine, ref), StoreError)


def test_a_failed_load_is_tried_afresh(engine: Engine, folder: Path) -> None:
    ref = publish(engine.loader.objects, engine.base, folder)
    data = engine.loader.objects.get_sync(ref.manifest_key)
    engine.loader.objects.delete_sync(ref.manifest_key)
    failure(engine, ref)
    engine.loader.objects.put_sync(ref.manifest_key, data)
    assert engine.loader.fetch(ref).result(LONG).nbytes > 0


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_refused_by_name(
    engine: Engine, folder: Path, tmp_path: Path, value: float
) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    name = sorted(tensors)[1]
    tensors[name][0, 0] = value
    bad = tmp_path / "bad"
    bad.mkdir()
    (bad / "adapter_config.json").write_bytes((folder / "adapter_config.json").read_bytes())
    save_file(tensors, bad / "adapter_model.safetensors")
    error = failure(engine, publish(engine.loader.objects, engine.base, bad))
    assert isinstance(error, InvalidAdapter)
    assert name in error.message


def test_an_adapter_for_another_base_is_refused(engine: Engine, folder: Path) -> None:
    ref = publish(engine.loader.objects, engine.base, folder)
    other = msgspec.structs.replace(engine.base, id="other", digest="0" * 64)
    foreign = publish(engine.loader.objects, other, folder, name="foreign")
    assert ref.digest != foreign.digest
    assert "made for the base 'other'" in failure(engine, foreign).message


def test_the_store_may_be_elsewhere(engine: Engine, folder: Path, tmp_path: Path) -> None:
    engine.loader.objects = Objects.open("memory://")
    ref = publish(engine.loader.objects, engine.base, folder)
    assert engine.loader.fetch(ref).result(LONG).nbytes > 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_table_saved_along_must_be_the_bases_own(model: Path, tmp_path: Path, dtype: str) -> None:
    """PEFT saves it in float32; a base in half precision is the same one, rounded."""
    settings = Settings.model_validate(
        {"data_dir": tmp_path, "kv_bytes": 1 << 20, "threads": 1, "dtype": dtype}
    )
    engine = Engine(settings, model)
    folder = make_lora(model, tmp_path / "table", target_modules=["embed_tokens"], r=2)
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    table = "base_model.model.model.embed_tokens.base_layer.weight"
    try:
        engine.loader.fetch(publish(engine.loader.objects, engine.base, folder)).result(LONG)
        save_file(tensors | {table: tensors[table].bfloat16()}, path)
        engine.loader.fetch(publish(engine.loader.objects, engine.base, folder, name="half")).result(LONG)
        tensors[table][7, 3] += 0.1
        save_file(tensors, path)
        error = failure(engine, publish(engine.loader.objects, engine.base, folder, name="other"))
    finally:
        engine.close()
    assert isinstance(error, InvalidAdapter)
    assert error.param == table
