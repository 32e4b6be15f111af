"""Rows of every kind of adapter in one batch: each gets what it gets alone."""

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import pytest

from server.messages import AdapterRef, Generate, Sampling
from tests.fixtures.adapters import (
    make_beft,
    make_bitfit,
    make_bottleneck,
    make_ia3,
    make_ln_tuning,
    make_prefix,
    make_prompt,
)
from tests.fixtures.engine import LINEARS, Driver, Stand, publish, run, same
from tests.fixtures.models import make_lora


def kinds(s: Stand, names: Collection[str] | None = None) -> dict[str, AdapterRef]:
    """One of every method, and of each way in which a method touches the model; or those named."""
    gpt2 = s.base.config.model_type == "gpt2"
    linears = LINEARS["gpt2" if gpt2 else "llama"]
    down = ["mlp.c_proj"] if gpt2 else ["down_proj"]
    makers: dict[str, Callable[[Any, Path], Path]] = {
        "lora": lambda m, f: make_lora(m, f, r=4, target_modules=linears, seed=1),
        "dora": lambda m, f: make_lora(m, f, r=4, use_dora=True, target_modules=linears, seed=2),
        "lora-norms": lambda m, f: make_lora(
            m, f, r=2, target_modules=linears[:2], modules_to_save=["ln_1" if gpt2 else "norm"], seed=13
        ),
        "bottleneck": lambda m, f: make_bottleneck(m, f, seed=3),
        "prefix": lambda m, f: make_prefix(m, f, 5, seed=4),
        "long-prefix": lambda m, f: make_prefix(m, f, 37, seed=5),
        "prompt": lambda m, f: make_prompt(m, f, 5, seed=6),
        "long-prompt": lambda m, f: make_prompt(m, f, 37, seed=7),
        "p-tuning": lambda m, f: make_prompt(m, f, 20, seed=8, encoder="MLP"),
        "bitfit": lambda m, f: make_bitfit(m, f, [*linears, "norm", "ln_1"], seed=9),
        "beft": lambda m, f: make_beft(m, f, target_modules=["lm_head"] if gpt2 else linears, seed=10),
        "ia3": lambda m, f: make_ia3(
            m, f, target_modules=linears[:2] + down, feedforward_modules=down, fan_in_fan_out=gpt2, seed=11
        ),
        "ln_tuning": lambda m, f: make_ln_tuning(m, f, seed=12),
    }
    return {
        name: publish(s.objects, s.engine.base, make(s.base, s.folder / name))
        for name, make in makers.items()
        if names is None or name in names
    }


@pytest.mark.parametrize("prefix_cache", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral", "gemma2"])
def test_sixteen_rows_of_all_kinds_and_of_none(
    stand: Callable[..., Stand], family: str, prefix_cache: bool
) -> None:
    s = stand(family, 0, max_batch_tokens=48, prefix_cache=prefix_cache)
    adapters = [*kinds(s).values(), None, None, None]
    commands = [s.generate(i, ref) for i, ref in enumerate(adapters)]
    expected = s.alone(commands)
    assert len({tuple(done.tokens[:6]) for done in expected}) == len(expected), "rows are too alike"
    driver = Driver(s.engine)
    for i, command in enumerate(commands):  # one joins at every second step, while others prefill or decode
        driver.submit(command)
        if i % 2:
            driver.step()
    together = len(s.engine.scheduler.running)
    driver.finish()
    assert together > 8
    for command, done in zip(commands, expected, strict=True):
        same(driver.rows[command.id], done)
    assert s.engine.model.digest() == s.engine.base.digest


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_all_kinds_with_evictions_and_preemptions_between(stand: Callable[..., Stand], family: str) -> None:
    s = stand(family, 0, max_batch_tokens=48, adapter_slots=3, kv_bytes=1 << 20, max_seqs=12)
    adapters = [*kinds(s).values(), None, None, None, None] * 2
    commands = [s.generate(i, ref, lengths=(60, 101, 144)) for i, ref in enumerate(adapters)]
    expected = s.alone(commands)
    for command, done, alone in zip(commands, run(s.engine, commands), expected, strict=True):
        assert done.error is None, command.id
        same(done, alone)
    assert s.engine.cache.evictions > len(adapters)
    assert s.engine.blocks.available == s.engine.blocks.count
    assert s.engine.model.digest() == s.engine.base.digest


@pytest.mark.parametrize("kind", ["prefix", "long-prefix", "prompt", "long-prompt"])
def test_virtual_tokens_are_shared_by_all_rows_of_the_adapter(stand: Callable[..., Stand], kind: str) -> None:
    """Full blocks of virtual tokens are found again even where the prompts have nothing in common."""
    s = stand("llama", 0)
    ref = kinds(s)[kind]
    sampling = Sampling(max_tokens=4, temperature=0.0, ignore_eos=True)
    rows = [Generate(str(i), "tenant", s.prompt(i, 24), sampling, ref) for i in range(3)]
    first, *others = [run(s.engine, [row])[0] for row in rows]
    blocks = s.engine.blocks.hits // 16
    assert blocks == (2 * len(others) if kind.startswith("long") else 0)
    assert [done.cached_tokens for done in (first, *others)] == [0, 0, 0], (
        "they are no tokens of the caller's"
    )
    fresh = stand("llama", 0, prefix_cache=False)
    ref = kinds(fresh)[kind]
    for i, done in enumerate((first, *others)):
        alone = run(fresh.engine, [Generate(str(i), "tenant", s.prompt(i, 24), sampling, ref)])[0]
        assert done.tokens == alone.tokens
