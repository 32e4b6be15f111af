"""Rows are strangers: what a row gets in a mixed batch is what it gets alone."""

from collections.abc import Callable

import pytest

from server.messages import AdapterRef, Generate, Sampling
from tests.fixtures.engine import Driver, Stand, run, same


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_sixteen_adapters_and_the_base_in_one_batch(stand: Callable[..., Stand], family: str) -> None:
    s = stand(family, 16, max_batch_tokens=48, prefix_cache=False)
    adapters = [*s.refs, None, None, s.refs[0], None]
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


def test_the_same_prompt_under_every_adapter(stand: Callable[..., Stand]) -> None:
    """Prefix sharing: within a tenant and an adapter, and never beyond."""
    s = stand("llama", 3)
    prompt = s.prompt(0, 50)

    def row(id_: str, tenant: str, ref: AdapterRef | None) -> Generate:
        return Generate(id_, tenant, prompt, Sampling(max_tokens=8, temperature=0.0, ignore_eos=True), ref)

    owners = [(tenant, ref) for tenant in ("one", "two") for ref in (None, *s.refs)]
    first = run(s.engine, [row(f"a{i}", *owner) for i, owner in enumerate(owners)])
    again = run(s.engine, [row(f"b{i}", *owner) for i, owner in enumerate(owners)])
    assert [done.cached_tokens for done in first] == [0] * 8
    assert [done.cached_tokens for done in again] == [48] * 8
    assert [done.tokens for done in again] == [done.tokens for done in first]
    assert [done.tokens for done in first[:4]] == [done.tokens for done in first[4:]]
    assert len({tuple(done.tokens) for done in first}) == 4


def test_an_adapter_that_overflows_ends_its_own_rows_only(stand: Callable[..., Stand]) -> None:
    s = stand("llama", 2, prefix_cache=True)
    poison = s.adapter("poison", 1, scale=1e30)
    refs = [s.refs[0], None, s.refs[1], None, s.refs[0]]
    commands = [s.generate(i, ref) for i, ref in enumerate(refs)]
    expected = s.alone(commands)
    bad = [s.generate(90 + i, poison, tenant="tenant-0") for i in range(3)]
    found = run(s.engine, [*bad, *commands])
    assert [done.error and done.error[0] for done in found[:3]] == ["non_finite_logits"] * 3
    assert [done.tokens for done in found[:3]] == [[]] * 3
    for done, solo in zip(found[3:], expected, strict=True):
        same(done, solo)
    # The blocks it filled with NaN serve others now, and nobody finds them by prefix.
    for done, solo in zip(run(s.engine, commands), expected, strict=True):
        same(done, solo)
    assert run(s.engine, bad[:1])[0].cached_tokens == 0


def test_an_adapter_that_is_not_there_ends_its_own_row_only(stand: Callable[..., Stand]) -> None:
    s = stand("llama", 1)
    ghost = AdapterRef("tenant", "ghost", 1, "0" * 64, "lora", "tenants/tenant/adapters/ghost/00000001.json")
    commands = [s.generate(0, s.refs[0]), s.generate(1, None)]
    expected = s.alone(commands)
    missing, *found = run(s.engine, [s.generate(2, ghost), *commands])
    assert missing.finish == "error"
    assert missing.error is not None
    assert missing.error[0] == "model_not_found"
    for done, solo in zip(found, expected, strict=True):
        same(done, solo)
