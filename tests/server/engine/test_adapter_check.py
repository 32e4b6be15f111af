"""The door: every version is loaded and run, beside the rows that run, before anybody may name it."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from adapters_store.manifest import decode_manifest
from server.engine.engine import Engine
from server.messages import Check, Checked, Generate, Sampling
from server.settings import Settings
from tests.fixtures.engine import publish, run
from tests.fixtures.models import make_lora

SECONDS = 60


@pytest.fixture(scope="module")
def model(tiny_models: Callable[[str], Path]) -> Path:
    return tiny_models("llama")


@pytest.fixture(scope="module")
def engine(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    settings = Settings(
        model=str(model),
        data_dir=tmp_path_factory.mktemp("gate"),
        kv_bytes=1 << 20,
        threads=1,
        adapter_slots=2,
    )
    engine = Engine(settings, model)
    yield engine
    assert engine.blocks.available == engine.blocks.count
    assert all(resident.references == 0 for resident in engine.cache.by_digest.values())
    engine.close()


def changed(folder: Path, out: Path, change: Callable[[torch.Tensor], torch.Tensor]) -> Path:
    """A copy of an adapter with its B matrices changed."""
    out.mkdir()
    (out / "adapter_config.json").write_bytes((folder / "adapter_config.json").read_bytes())
    tensors = load_file(folder / "adapter_model.safetensors")
    new = {name: change(t).contiguous() if "lora_B" in name else t for name, t in tensors.items()}
    save_file(new, out / "adapter_model.safetensors")
    return out


def ask(engine: Engine, folder: Path, *, allow_noop: bool = False) -> Checked:
    """What the gate says of a staged version: its manifest is taken out of the store again."""
    objects = engine.loader.objects
    ref = publish(objects, engine.base, folder)
    manifest = objects.get_sync(ref.manifest_key)
    objects.delete_sync(ref.manifest_key)
    engine.submit(Check("check", manifest, allow_noop))
    while engine.busy:
        assert engine.step() == []
    (verdict,) = engine.checked()
    assert verdict.id == "check"
    return verdict


@pytest.fixture(scope="module")
def good(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_lora(model, tmp_path_factory.mktemp("gate-loras") / "good", target_modules=["q_proj"], r=4)


def test_a_good_version_passes_with_its_facts(engine: Engine, good: Path) -> None:
    verdict = ask(engine, good)
    assert verdict.error is None
    assert verdict.facts["effect"] > 0  # type: ignore[operator]
    assert verdict.facts["device_bytes"] == 2 * 4 * (64 + 64) * 4
    assert ask(engine, good).facts == verdict.facts  # also when it is resident already


def test_one_that_changes_nothing_needs_leave(engine: Engine, good: Path, tmp_path: Path) -> None:
    idle = changed(good, tmp_path / "idle", torch.zeros_like)
    refused = ask(engine, idle)
    assert refused.error is not None
    assert refused.error[0] == "invalid_adapter"
    assert "allow_noop" in refused.error[1]
    assert ask(engine, idle, allow_noop=True).error is None


def test_finite_weights_that_overflow_are_refused(engine: Engine, good: Path, tmp_path: Path) -> None:
    verdict = ask(engine, changed(good, tmp_path / "huge", lambda t: t * 1e38))
    assert verdict.error is not None
    assert verdict.error[0] == "invalid_adapter"


def test_one_that_no_device_memory_could_hold_is_too_large(
    engine: Engine, good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine.cache, "budget", 1000)
    verdict = ask(engine, changed(good, tmp_path / "large", lambda t: t * 0.5))
    assert verdict.error is not None
    assert verdict.error[0] == "too_large"
    assert not engine.adapter_check.dry_runs


def test_other_rows_go_on_beside_a_trial(engine: Engine, good: Path, tmp_path: Path) -> None:
    sampling = Sampling(max_tokens=24, temperature=0.0, ignore_eos=True)
    rows = [Generate(f"row {i}", "tenant", [i + 1] * 20, sampling) for i in range(3)]
    alone = [done.tokens for done in run(engine, rows)]
    ref = publish(engine.loader.objects, engine.base, changed(good, tmp_path / "nan", lambda t: t * 1e38))
    engine.submit(Check("bad", engine.loader.objects.get_sync(ref.manifest_key)))
    assert [done.tokens for done in run(engine, rows)] == alone
    assert [checked.error is None for checked in engine.checked()] == [False]


def test_what_is_no_manifest_is_refused(engine: Engine) -> None:
    engine.submit(Check("bad", b"{}"))
    assert [c.error and c.error[0] for c in engine.checked()] == ["invalid_adapter"]


def test_a_version_whose_bytes_are_damaged_is_refused(engine: Engine, good: Path) -> None:
    ref = publish(engine.loader.objects, engine.base, good, name="damaged")
    manifest = engine.loader.objects.get_sync(ref.manifest_key)
    engine.submit(Check("bad", manifest.replace(b'"lora_alpha": 8', b'"lora_alpha": 9')))
    assert decode_manifest(manifest).config["lora_alpha"] == 8
    while not (verdicts := engine.checked()):
        engine.step()
    assert verdicts[0].error is not None
