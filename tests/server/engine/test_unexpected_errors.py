"""What nobody foresaw ends the row, the trial or the command it came with; everybody else goes on."""

import dataclasses
import logging
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import msgspec
import pytest
import torch

from server.engine.engine import Engine
from server.engine.scheduling.row import Row
from server.engine.unexpected_errors import raise_if_device_lost
from server.messages import AdapterRef, Check, Checked, Generate, Sampling
from tests.fixtures.engine import Driver, Stand, run, same

Stands = Callable[..., Stand]


def out_of_range(command: Generate) -> Generate:
    """With a bias for a token that no vocabulary has: the API refuses it, the engine trusts the API."""
    sampling = msgspec.structs.replace(command.sampling, logit_bias={1 << 40: 1.0})
    return msgspec.structs.replace(command, id=f"bad-{command.id}", sampling=sampling)


def fail_for(engine: Engine, digest: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on a forward pass that has a row of this adapter in it fails half-way."""
    forward = engine.model.forward

    def failing(rows: list[Row]) -> torch.Tensor:
        logits = forward(rows)
        if any(row.adapter and row.adapter.digest == digest for row in rows):
            raise ValueError("a kernel's own mistake")
        return logits

    monkeypatch.setattr(engine.model, "forward", failing)


def trial(s: Stand, ref: AdapterRef) -> Checked:
    s.engine.submit(Check("check", s.objects.get_sync(ref.manifest_key)))
    while s.engine.busy:
        assert s.engine.step() == []
    (verdict,) = s.engine.checked()
    return verdict


def untouched(engine: Engine) -> bool:
    """Nothing is held for rows that are over."""
    pins = [resident.references for resident in engine.cache.by_digest.values()]
    return engine.blocks.available == engine.blocks.count and not any(pins)


def test_a_row_whose_sampling_fails_ends_and_the_batch_goes_on(
    stand: Stands, caplog: pytest.LogCaptureFixture
) -> None:
    s = stand("llama", 3)
    commands = [s.generate(i, ref) for i, ref in enumerate([*s.refs, None, s.refs[0]])]
    expected = s.alone(commands)
    driver = Driver(s.engine)
    for command in commands[:3]:
        driver.submit(command)
    for _ in range(3):  # these decode when the bad ones come
        driver.step()
    bad = [out_of_range(s.generate(i, ref)) for i, ref in enumerate([s.refs[1], None])]
    for command in [bad[0], *commands[3:], bad[1]]:
        driver.submit(command)
    with caplog.at_level(logging.ERROR):
        driver.finish()
    for command in bad:
        assert driver.rows[command.id].error == (
            "internal_error",
            "The server failed at this request, by a fault of its own; its log says more.",
        )
    for command, done in zip(commands, expected, strict=True):
        same(driver.rows[command.id], done)
    assert any(record.exc_info for record in caplog.records)
    assert s.engine.counts["internal_errors"] == 2
    assert untouched(s.engine)


def test_an_adapter_that_breaks_the_forward_pass_ends_its_own_rows(
    stand: Stands, monkeypatch: pytest.MonkeyPatch
) -> None:
    s = stand("gpt2", 2)
    commands = [s.generate(i, ref) for i, ref in enumerate([s.refs[0], None, s.refs[1], s.refs[1], None])]
    expected = s.alone(commands)
    fail_for(s.engine, s.refs[1].digest, monkeypatch)
    found = run(s.engine, commands)
    for command, done, solo in zip(commands, found, expected, strict=True):
        if command.adapter == s.refs[1]:
            assert done.error is not None
            assert done.error[0] == "internal_error"
        else:
            same(done, solo)
    assert untouched(s.engine)


def test_a_row_that_cannot_be_delivered_ends_and_nobody_is_told_twice(
    stand: Stands, monkeypatch: pytest.MonkeyPatch
) -> None:
    s = stand("llama", 1)
    commands = [s.generate(i, ref) for i, ref in enumerate([None, s.refs[0], None])]
    expected = s.alone(commands)
    commit = s.engine.scheduler.commit

    def failing(row: Row, tokens: list[int]) -> None:
        commit(row, tokens)
        if row.id == "row-1" and row.output_length == 3:
            raise KeyError(row.id)

    monkeypatch.setattr(s.engine.scheduler, "commit", failing)
    found = run(s.engine, commands)
    assert found[1].error is not None
    assert found[1].tokens == expected[1].tokens[:2]
    same(found[0], expected[0])
    same(found[2], expected[2])


def test_an_adapter_that_no_bank_takes_ends_its_own_rows(
    stand: Stands, monkeypatch: pytest.MonkeyPatch
) -> None:
    s = stand("llama", 2)
    bank = s.engine.cache.banks["lora"]
    put: Callable[[int, Any], None] = bank.put
    broken = [0]

    def failing(slot: int, packed: Any) -> None:
        put(slot, packed)
        if not broken[0]:
            broken[0] = slot
            raise RuntimeError("half of it is there")

    monkeypatch.setattr(bank, "put", failing)
    rows = [s.generate(0, s.refs[0]), s.generate(1, None)]
    first, other = run(s.engine, rows)
    assert first.error is not None
    assert first.error[0] == "internal_error"
    assert other.error is None
    again = run(s.engine, rows)  # it is loaded afresh
    assert [done.error for done in again] == [None, None]
    assert again[1].tokens == other.tokens


def test_a_copy_that_breaks_between_two_steps_ends_the_rows_that_wait_for_it(
    stand: Stands, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU an adapter arrives while nobody asks for it."""
    s = stand("llama", 1)
    copy: Callable[[Any], Any] = s.engine.cache._copy
    looks = [False, False]

    def late(packed: Any) -> Any:
        return dataclasses.replace(copy(packed), arrived=lambda: not looks or looks.pop())

    def failing(_slot: int, _packed: Any) -> None:
        raise RuntimeError("no room there")

    monkeypatch.setattr(s.engine.cache, "_copy", late)
    monkeypatch.setattr(s.engine.cache.banks["lora"], "put", failing)
    (done,) = run(s.engine, [s.generate(0, s.refs[0])])
    assert done.error is not None
    assert done.error[0] == "internal_error"
    assert untouched(s.engine)


def test_a_trial_that_breaks_is_refused_and_the_next_one_is_not(
    stand: Stands, monkeypatch: pytest.MonkeyPatch
) -> None:
    s = stand("llama", 2)
    with monkeypatch.context() as broken:
        fail_for(s.engine, s.refs[0].digest, broken)
        verdict = trial(s, s.refs[0])
        assert verdict.error is not None
        assert verdict.error[0] == "internal_error"
        assert trial(s, s.refs[1]).error is None
    assert trial(s, s.refs[0]).error is None


def test_a_trial_is_not_judged_by_a_base_that_failed(stand: Stands, monkeypatch: pytest.MonkeyPatch) -> None:
    s = stand("llama", 2)
    with monkeypatch.context() as broken:
        forward = s.engine.model.forward

        def failing(rows: list[Row]) -> torch.Tensor:
            if any(row.id == "gate-base" for row in rows):
                raise ValueError("not the trial's fault")
            return forward(rows)

        broken.setattr(s.engine.model, "forward", failing)
        verdict = trial(s, s.refs[0])
        assert verdict.error is not None
        assert verdict.error[0] == "unavailable"
    assert trial(s, s.refs[0]).error is None


@pytest.mark.parametrize("step", ["add_pending", "_too_large", "_compare_with_base"])
def test_whatever_fails_in_a_trial_ends_that_trial(
    stand: Stands, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    s = stand("llama", 1)

    def failing(*_: object) -> None:
        raise ZeroDivisionError

    with monkeypatch.context() as broken:
        broken.setattr(s.engine.cache if step == "add_pending" else s.engine.adapter_check, step, failing)
        verdict = trial(s, s.refs[0])
        assert verdict.error is not None
        assert verdict.error[0] == "internal_error"
    assert not s.engine.adapter_check.dry_runs
    assert trial(s, s.refs[0]).error is None


def test_a_schema_that_breaks_its_compiler_ends_its_row(
    stand: Stands, monkeypatch: pytest.MonkeyPatch
) -> None:
    s = stand("llama", 0)

    def failing(_schema: str) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_exception(RecursionError("too deep"))
        return future

    monkeypatch.setattr(s.engine.admission.grammars, "compile", failing)
    sampling = Sampling(max_tokens=4, temperature=0.0, grammar='{"type": "object"}')
    found = run(s.engine, [Generate("schema", "tenant", s.prompt(0, 4), sampling), s.generate(0, None)])
    assert found[0].error is not None
    assert found[0].error[0] == "internal_error"
    assert found[1].error is None


def test_a_lost_device_ends_the_process() -> None:
    """After one of CUDA's errors nothing can be computed on it by this process."""
    lost = torch.AcceleratorError("CUDA error: device-side assert triggered")
    with pytest.raises(torch.AcceleratorError):
        raise_if_device_lost(lost, torch.device("cuda"))
    raise_if_device_lost(lost, torch.device("cpu"))
