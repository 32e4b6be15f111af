"""Hundreds of damaged adapters a method: each is refused by a sentence, or serves, and harms nobody.

Every mutant goes through what an upload goes through: `inspect`, and if that lets it in, the engine's gate,
beside rows of the base and of a sound adapter. To replay one: `mutate(kinds[METHOD], SEED)`.
`--mutants 2000` makes more of them.
"""

import gc
import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import psutil
import pytest

from adapters_store.manifest import Blob, Manifest, content_digest, encode_manifest
from adapters_store.names import blob_key
from server.adapters.methods import build_methods
from server.api.adapters.publish import AdapterUpload, Inspected, inspect
from server.api.services import Services
from server.errors import PolypeftError, error_from_code
from server.messages import AdapterRef, Check, Checked, Forget, Generate, Sampling
from server.settings import Settings
from tests.fixtures.adapters import make_beft, make_bitfit, make_ia3, make_ln_tuning, make_prefix, make_prompt
from tests.fixtures.cost import processor_seconds
from tests.fixtures.engine import Driver, Stand, publish
from tests.fixtures.models import load_model, make_lora
from tests.fixtures.mutants import Mutant, mutate

METHODS = ("lora", "bottleneck", "prefix", "prompt", "bitfit", "ia3", "ln_tuning")
TRIALS = 120  # of a method's, how many that differ go on to the gate
AT_ONCE = 8
SECOND = 1.0
SENTENCE = 1000  # characters; a refusal quotes little of what came
GROWTH = 24 << 20  # bytes; caches and allocators settle, leaks go on
GOLDEN = Path(__file__).resolve().parents[3] / "golden" / "adapterhub" / "llama"
LINEARS = ["q_proj", "v_proj", "down_proj"]
NEW = 40


@pytest.fixture(scope="module")
def stand(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stand]:
    """Caches so small that they fill at once: what grows after that is a leak."""
    small = {"adapter_ram_bytes": 1 << 20, "adapter_disk_bytes": 1 << 20, "adapter_slots": 6}
    s = Stand(GOLDEN / "base", tmp_path_factory.mktemp("mutants"), 0, kv_bytes=1 << 20, **small)
    yield s
    assert s.engine.model.digest() == s.engine.base.digest
    s.engine.close()


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Path]]:
    """Sound adapters by method, the first of which is served beside the mutants."""
    root, base = tmp_path_factory.mktemp("sound"), load_model(GOLDEN / "base")
    modules = [name for name, _ in base.named_modules() if name.endswith((*LINEARS, "layernorm"))]
    patterns: dict[str, Any] = {
        "rank_pattern": {"q_proj": 2},
        "alpha_pattern": {"layers.0.self_attn.v_proj": 3},
    }
    return {
        "lora": [
            make_lora(base, root / "plain", r=4, target_modules=LINEARS),
            make_lora(base, root / "dora", r=4, use_dora=True, target_modules=LINEARS),
            make_lora(base, root / "patterns", r=4, target_modules=LINEARS, **patterns),
            make_lora(base, root / "table", r=2, target_modules=["embed_tokens", "q_proj"]),
            make_lora(base, root / "norms", r=2, target_modules=["q_proj"], modules_to_save=["norm"]),
        ],
        "bottleneck": [
            GOLDEN / name for name in ("double_seq_bn", "par_bn", "factors", "learned", "channel")
        ],
        "prefix": [make_prefix(base, root / "prefix", 5), make_prefix(base, root / "long", 20)],
        "prompt": [make_prompt(base, root / "prompt", 5), make_prompt(base, root / "p", 4, encoder="MLP")],
        "bitfit": [
            make_bitfit(base, root / "absolute", modules),
            make_bitfit(base, root / "delta", modules, mode="delta"),
            make_beft(base, root / "beft", target_modules=LINEARS),
        ],
        "ia3": [
            make_ia3(base, root / "ia3", target_modules=LINEARS, feedforward_modules=["down_proj"]),
            make_ia3(base, root / "outputs", target_modules=LINEARS, feedforward_modules=[]),
            silent(make_ia3(base, root / "silent", target_modules=LINEARS, feedforward_modules=LINEARS)),
        ],
        "ln_tuning": [make_ln_tuning(base, root / "ln", target_modules=["norm", "input_layernorm"])],
    }


def silent(ia3: Path) -> Path:
    """The adapter, its config without the field that says which modules' inputs it scales."""
    config = ia3 / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"feedforward_modules": None}))
    return ia3


@pytest.mark.parametrize("method", METHODS)
def test_each_is_refused_or_serves_and_harms_nobody(
    stand: Stand,
    kinds: dict[str, list[Path]],
    method: str,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    record_property: Callable[[str, object], None],
) -> None:
    count = request.config.getoption("--mutants")
    seeds = [f"{method} {i}" for i in range(count)]
    verdicts: Counter[str] = Counter()
    door = Door(stand, tmp_path)
    passed: dict[str, tuple[str, Manifest, Mutant]] = {}
    for seed in seeds:
        mutant = mutate(kinds[method], seed)
        found = door.look(mutant, seed)
        if isinstance(found, PolypeftError):
            verdicts[found.code] += 1
        else:
            manifest = door.stage(found, mutant)
            passed.setdefault(manifest.digest, (seed, manifest, mutant))
            verdicts["inspected"] += 1
    assert verdicts["invalid_adapter"] > count // 4
    assert len(passed) > TRIALS // 4
    step = max(1, len(passed) // TRIALS)
    trials = list(islice(passed.values(), 0, None, step))
    verdicts.update(door.try_all(trials, kinds[method][0]))
    assert verdicts["serves"] > 0
    record_property("verdicts", dict(verdicts))


class Door:
    """An upload's way, without HTTP: inspected, staged, tried."""

    def __init__(self, stand: Stand, folder: Path) -> None:
        self.stand = stand
        self.engine = stand.engine
        self.folder = folder
        self.parts = cast("Services", SimpleNamespace(settings=Settings(), methods=build_methods(256)))

    def look(self, mutant: Mutant, seed: str) -> Inspected | PolypeftError:
        """What `inspect` says of it. Any other exception than ours fails the test, as does a slow answer."""
        config, weights = self.folder / "config", self.folder / "weights"
        config.write_bytes(mutant.config)
        weights.write_bytes(mutant.weights)
        files = AdapterUpload(("adapter_config.json", config), ("adapter_model.safetensors", weights))
        found: Inspected | PolypeftError
        with processor_seconds(SECOND, (seed, mutant.changes)):
            try:
                found = inspect(files, self.parts, self.engine.base)
            except PolypeftError as error:
                found = error
                check_refusal(error, seed)
            except Exception as error:
                raise AssertionError(f"{seed!r} {mutant.changes}") from error
        return found

    def stage(self, found: Inspected, mutant: Mutant) -> Manifest:
        base, sha256 = self.engine.base, hashlib.sha256(mutant.weights).hexdigest()
        blob = Blob("adapter_model.safetensors", blob_key("evil", sha256), sha256, len(mutant.weights))
        digest = content_digest(found.method, base.digest, found.config, sha256)
        return Manifest(
            tenant="evil",
            name="mutant",
            version=1,
            method=found.method,
            base=base.id,
            base_digest=base.digest,
            digest=digest,
            files=[blob],
            config=found.config,
            tensors=found.tensors,
            created=0,
        )

    def try_all(self, trials: list[tuple[str, Manifest, Mutant]], sound: Path) -> Counter[str]:
        """Through the gate, some at once, beside rows that must not notice."""
        own = publish(self.stand.objects, self.engine.base, sound)
        beside = [self._row(i, ref) for i, ref in enumerate((None, own, None, own))]
        alone = [done.tokens for done in self.stand.alone(beside)]
        verdicts: Counter[str] = Counter()
        settled = 0
        for at in range(0, len(trials), AT_ONCE):
            batch = trials[at : at + AT_ONCE]
            for seed, checked in self._try(batch, beside, alone):
                if checked.error is None:
                    verdicts["serves"] += 1
                else:
                    check_refusal(error_from_code(*checked.error), seed)
                    verdicts["refused by the gate"] += 1
            if not settled and at > len(trials) // 3:
                settled = resident()
        assert resident() - settled < GROWTH
        self._forget(own, trials)
        return verdicts

    def _try(
        self, batch: list[tuple[str, Manifest, Mutant]], beside: list[Generate], alone: list[list[int]]
    ) -> Iterator[tuple[str, Checked]]:
        seeds = [seed for seed, _, _ in batch]
        for _seed, manifest, mutant in batch:
            (self.folder / "weights").write_bytes(mutant.weights)
            self.stand.objects.put_sync(
                manifest.files[0].key, self.folder / "weights", manifest.files[0].sha256
            )
        driver = Driver(self.engine)
        for command in beside:
            driver.submit(command)
        start = time.process_time()
        for seed, manifest, _ in batch:
            self.engine.submit(Check(seed, encode_manifest(manifest)))
        found: list[Checked] = []
        while self.engine.busy:
            driver.step()
            found += self.engine.checked()
            assert len(found) == len(batch) or time.process_time() - start < SECOND * len(batch), seeds
        assert [done.tokens for done in driver.rows.values()] == alone, seeds
        assert sorted(checked.id for checked in found) == sorted(seeds)
        assert self.engine.blocks.available == self.engine.blocks.count, seeds
        cache = self.engine.cache
        assert all(resident.references == 0 for resident in cache.by_slot.values()), seeds
        assert len(cache.free) + len(cache.by_slot) == cache.slots, seeds
        assert not self.engine.adapter_check.dry_runs, seeds
        yield from ((checked.id, checked) for checked in found)

    def _row(self, i: int, ref: AdapterRef | None) -> Generate:
        sampling = Sampling(max_tokens=NEW, temperature=0.0, ignore_eos=True, seed=0)
        return Generate(f"beside {i}", "tenant", self.stand.prompt(i, 3 + 20 * i), sampling, ref)

    def _forget(self, own: AdapterRef, trials: list[tuple[str, Manifest, Mutant]]) -> None:
        for digest in (own.digest, *(manifest.digest for _, manifest, _ in trials)):
            self.engine.submit(Forget(digest))
        assert self.engine.cache.nbytes == 0
        assert len(self.engine.cache.free) == self.engine.cache.slots
        assert not self.engine.cache.pending.loads


def check_refusal(error: PolypeftError, seed: str) -> None:
    """A caller's mistake, said in a sentence that any terminal can show."""
    assert 400 <= error.status < 500, (seed, error.message)
    assert len(error.message) <= SENTENCE, (seed, error.message)
    assert error.message.isprintable(), (seed, error.message)
    assert error.param is None or error.param.isprintable(), seed


def resident() -> int:
    gc.collect()
    size: int = psutil.Process().memory_info().rss
    return size
