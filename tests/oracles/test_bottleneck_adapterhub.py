"""Bottleneck rows of the engine against AdapterHub: the same greedy tokens, and logits within 1e-4, in fp32.

The library cannot be installed beside our transformers; what it computed lies in tests/golden/adapterhub,
where make.py says how it came about. All adapters of a family run in one batch with rows of the base, in
steps so small that prompts are cut in the middle of KV blocks and sliding windows. Of the default model's
logits a sample was recorded: the best, and those of 240 tokens drawn once.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from adapters_store.object_store.store import Objects
from server.adapters.formats.pickle_sandbox import PICKLES, convert_pickle
from server.engine.engine import Engine
from server.messages import AdapterRef, Generate, Sampling
from server.settings import Settings
from tests.fixtures.engine import Done, publish, record_logits, run
from tests.fixtures.models import load_model, logits_of
from tests.oracles.bench import TOLERANCE, WORST_REAL, Bench

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "adapterhub"
FAMILIES = ("llama", "gpt2", "mistral", "qwen2", "qwen3", "gemma2")
REAL = GOLDEN.parent / "smollm2"
PROMPTS: dict[str, list[int]] = json.loads((GOLDEN / "prompts.json").read_text())
CASES = sorted(
    (family, config.parent.name)
    for family in FAMILIES
    for config in (GOLDEN / family).glob("*/adapter_config.json")
)


@dataclass
class Family:
    """All rows of a family, run; and what they should have been."""

    name: str
    golden: dict[str, torch.Tensor]
    rows: dict[str, Done]
    logits: dict[str, list[torch.Tensor]]


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Family]:
    """Each run when the first test asks for it."""
    return cache(lambda name: run_family(name, tmp_path_factory.mktemp(name)))


def run_family(name: str, folder: Path) -> Family:
    settings = Settings(
        data_dir=folder,
        threads=1,
        max_batch_tokens=16,
        max_seqs=12,
        kv_bytes=4 << 20,
        prefix_cache=False,
        lookup_tokens=0,
    )
    engine = Engine(settings, GOLDEN / name / "base")
    objects = Objects.open(settings.store_url)
    refs: dict[str, AdapterRef | None] = {"base": None}
    for family, adapter in CASES:
        if family == name:
            refs[adapter] = publish(objects, engine.base, as_safetensors(GOLDEN / name / adapter, folder))
    logits = record_logits(engine)
    golden = load_file(GOLDEN / name / "golden.safetensors")
    sampling = Sampling(max_tokens=len(golden["seq_bn/1/tokens"]), temperature=0.0, ignore_eos=True, seed=0)
    commands = [
        Generate(f"{adapter}/{prompt}", "tenant", ids, sampling, ref)
        for prompt, ids in PROMPTS.items()
        for adapter, ref in refs.items()
    ]
    before = engine.model.digest()
    done = run(engine, commands)
    assert engine.model.digest() == before
    engine.close()
    rows = {command.id: one for command, one in zip(commands, done, strict=True)}
    return Family(name, golden, rows, logits)


def as_safetensors(source: Path, folder: Path) -> Path:
    """The adapter's folder, or a copy of it with its pickle converted."""
    for pickled, converted in PICKLES.items():
        if (source / pickled).exists():
            copy = folder / source.name
            copy.mkdir()
            convert_pickle(source / pickled, copy / converted)
            shutil.copy(source / "adapter_config.json", copy)
            return copy
    return source


@pytest.mark.parametrize(("name", "adapter"), CASES)
def test_adapterhub(families: Callable[[str], Family], name: str, adapter: str) -> None:
    family = families(name)
    for prompt in PROMPTS:
        id_ = f"{adapter}/{prompt}"
        assert family.rows[id_].error is None
        assert family.rows[id_].tokens == family.golden[f"{id_}/tokens"].tolist(), f"prompt of {prompt}"
        error = (torch.stack(family.logits[id_]) - family.golden[f"{id_}/logits"]).abs().max()
        assert error <= TOLERANCE, f"prompt of {prompt}"
    changed = (torch.stack(family.logits[id_])[0] - family.logits[f"base/{prompt}"][0]).abs().max()
    assert changed > 1000 * TOLERANCE, "the adapter changes nothing"


@pytest.mark.parametrize("name", FAMILIES)
def test_rows_of_the_base_beside_them(families: Callable[[str], Family], name: str) -> None:
    family = families(name)
    model = load_model(GOLDEN / name / "base")
    for prompt, ids in PROMPTS.items():
        tokens = family.rows[f"base/{prompt}"].tokens
        with torch.inference_mode():
            logits = logits_of(model, ids, tokens)
        assert (torch.stack(family.logits[f"base/{prompt}"]) - logits).abs().max() <= TOLERANCE


@pytest.mark.parametrize("adapter", ["seq_bn", "double_seq_bn", "par_bn"])
def test_smollm2(real: Bench, adapter: str) -> None:
    golden = load_file(REAL / "golden.safetensors")
    prompts: dict[str, list[int]] = json.loads((REAL / "prompts.json").read_text())
    ref = real.publish(REAL / adapter)
    expected = {prompt: golden[f"{adapter}/{prompt}/tokens"].tolist() for prompt in prompts}
    sampling = Sampling(max_tokens=len(expected["short"]), temperature=0.0, ignore_eos=True, seed=0)
    real.logits.clear()
    rows = [(prompt, ref) for prompt in prompts] + [(prompt, None) for prompt in prompts]
    commands = [Generate(f"{p}/{bool(r)}", "tenant", prompts[p], sampling, r) for p, r in rows]
    done = run(real.engine, commands)
    for prompt, row in zip(prompts, done, strict=False):
        assert row.error is None
        assert row.tokens == expected[prompt]
        found, base = (torch.stack(real.logits[f"{prompt}/{by}"]) for by in (True, False))
        ids = golden[f"{adapter}/{prompt}/ids"].long()
        error = (found.gather(1, ids) - golden[f"{adapter}/{prompt}/logits"]).abs().flatten()
        assert error.max() <= WORST_REAL
        assert error.kthvalue(error.numel() * 999 // 1000).values <= TOLERANCE
        assert (found[0] - base[0]).abs().max() > 1000 * TOLERANCE, "the adapter changes nothing"
