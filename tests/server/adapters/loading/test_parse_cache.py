"""Adapters that were made alike are packed as the first of them was."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from server.adapters.loading.parse_cache import PackPlan, ParseCache
from server.adapters.methods.interface import Packed
from server.engine.engine import Engine
from server.errors import InvalidAdapter
from server.kernels.cpu.openmp import AVAILABLE
from server.messages import AdapterRef
from server.settings import Settings
from tests.fixtures.engine import publish
from tests.fixtures.models import make_lora

pytestmark = pytest.mark.skipif(not AVAILABLE, reason="what is recorded is run by a kernel")

LONG = 60


@pytest.fixture(scope="module")
def model(tiny_models: Callable[[str], Path]) -> Path:
    return tiny_models("llama")


@pytest.fixture
def engine(model: Path, tmp_path: Path) -> Iterator[Engine]:
    settings = Settings(model=str(model), data_dir=tmp_path / "data", kv_bytes=1 << 20, threads=1)
    engine = Engine(settings, model)
    yield engine
    engine.close()


@pytest.fixture
def replayed(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of each load, whether its plan had a template."""
    found, original = [], PackPlan.replay

    def replay(plan: PackPlan, raw: torch.Tensor) -> object:
        packed = original(plan, raw)
        found.append(packed is not None)
        return packed

    monkeypatch.setattr(PackPlan, "replay", replay)
    return found


def lora(model: Path, folder: Path, seed: int, **config: Any) -> Path:
    return make_lora(model, folder, target_modules=["q_proj", "down_proj"], r=4, seed=seed, **config)


def load(engine: Engine, folder: Path) -> AdapterRef:
    return publish(engine.loader.objects, engine.base, folder)


def test_the_second_is_what_its_method_would_make_of_it(
    engine: Engine, model: Path, tmp_path: Path, replayed: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded, record = [], PackPlan.record

    def noting(plan: PackPlan, packed: Packed, raw: torch.Tensor) -> None:
        record(plan, packed, raw)
        recorded.append(plan)

    monkeypatch.setattr(PackPlan, "record", noting)
    refs = [load(engine, lora(model, tmp_path / str(seed), seed, lora_alpha=3)) for seed in range(2)]
    first, second = (engine.loader.fetch(ref).result(LONG) for ref in refs)
    assert replayed == [False, True]
    assert not torch.equal(first.flat, second.flat)
    assert second.layout is first.layout
    assert second.copies is None
    (plan,) = {id(r): r for r in recorded}.values()
    assert plan.template
    assert plan.template[0].flat.untyped_storage().nbytes() == 0  # it keeps nobody's numbers

    loader, packer = engine.loader, engine.loader.packer
    packer.parse_cache = ParseCache(packer.methods, engine.base, packer.parse_cache.limits)
    loader.ram.drop(refs[1].digest)
    by_method = loader.fetch(refs[1]).result(LONG)
    assert not replayed[-1]
    assert torch.equal(by_method.flat, second.flat)
    assert by_method.checksum == second.checksum


def test_what_is_computed_is_not_learnt(
    engine: Engine, model: Path, tmp_path: Path, replayed: list[bool]
) -> None:
    for seed in range(2):
        engine.loader.fetch(load(engine, lora(model, tmp_path / str(seed), seed, use_dora=True))).result(LONG)
    assert replayed == [False, False]


def test_one_that_is_not_finite_is_refused_by_name_all_the_same(
    engine: Engine, model: Path, tmp_path: Path, replayed: list[bool]
) -> None:
    good, bad = lora(model, tmp_path / "good", 0), lora(model, tmp_path / "bad", 1)
    tensors = load_file(bad / "adapter_model.safetensors")
    name = sorted(tensors)[3]
    tensors[name][-1, -1] = torch.inf
    save_file(tensors, bad / "adapter_model.safetensors", {"format": "pt"})
    good_ref, bad_ref = load(engine, good), load(engine, bad)
    engine.loader.fetch(good_ref).result(LONG)
    error = engine.loader.fetch(bad_ref).exception(LONG)
    assert isinstance(error, InvalidAdapter)
    assert name in error.message
    assert replayed == [False, False]
