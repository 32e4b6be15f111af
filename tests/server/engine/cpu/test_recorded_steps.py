"""Decode steps as one launch: the same bits as layer by layer, whoever is in the batch."""

from collections.abc import Callable

import pytest
import torch

from server.engine.cpu.recorded_steps import RecordedSteps
from server.kernels.cpu.openmp import AVAILABLE
from server.messages import AdapterRef, Generate, Sampling
from tests.fixtures.engine import Stand, record_logits, run, same
from tests.server.engine.test_mixed_methods import kinds

pytestmark = pytest.mark.skipif(not AVAILABLE, reason="needs numba and libgomp")

RECORDABLE = ("lora", "dora", "bottleneck", "prefix", "prompt", "bitfit")


def programs(s: Stand) -> RecordedSteps:
    decoder = s.engine.model.decoder
    assert decoder is not None, "this family runs by kernels"
    return decoder.recorded_steps


def commands(s: Stand, refs: list[AdapterRef | None], new: int = 12) -> list[Generate]:
    sampling = Sampling(max_tokens=new, temperature=0.0, ignore_eos=True)
    return [
        Generate(f"row-{i}", "tenant", s.prompt(i, (3, 16, 17, 33)[i % 4]), sampling, ref)
        for i, ref in enumerate(refs)
    ]


def logits_of(
    s: Stand, asked: list[Generate], monkeypatch: pytest.MonkeyPatch, *, recorded: bool
) -> dict[str, torch.Tensor]:
    with monkeypatch.context() as patched:
        if not recorded:
            patched.setattr(programs(s), "run", lambda *_: None)
        patched.setattr(s.engine.model, "forward", s.engine.model.forward)
        found = record_logits(s.engine)
        assert not any(done.error for done in run(s.engine, asked))
        return {row: torch.stack(own) for row, own in found.items()}


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral"])
def test_the_same_bits_as_layer_by_layer(
    stand: Callable[..., Stand], family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    s = stand(family, 0, lookup_tokens=0, prefix_cache=False)
    names = [name for name in RECORDABLE if (family, name) != ("qwen3", "bitfit")]  # it names norms of heads
    asked = commands(s, [*kinds(s, names).values(), None, None])
    plain = logits_of(s, asked, monkeypatch, recorded=False)
    assert programs(s).runs == 0
    recorded = logits_of(s, asked, monkeypatch, recorded=True)
    assert programs(s).runs >= 8
    assert plain.keys() == recorded.keys()
    for row, logits in plain.items():
        assert torch.equal(logits, recorded[row]), row
    alone = logits_of(s, asked[:1], monkeypatch, recorded=True)
    assert torch.equal(alone["row-0"], plain["row-0"])


def test_an_adapter_with_norms_slows_no_step_but_its_own(stand: Callable[..., Stand]) -> None:
    s = stand("llama", 0, lookup_tokens=0, prefix_cache=False)
    found = kinds(s, ("lora", "lora-norms"))
    runs = []
    for name in ("lora-norms", "lora"):
        run(s.engine, commands(s, [found[name]]))
        runs.append(programs(s).runs)
    assert found["lora-norms"].digest in s.engine.cache.by_digest, "it is still in its slot"
    assert runs[0] == 0
    assert runs[1] >= 8


def test_a_program_serves_whoever_has_the_slots_now(
    stand: Callable[..., Stand], monkeypatch: pytest.MonkeyPatch
) -> None:
    s = stand("llama", 8, lookup_tokens=0, prefix_cache=False, adapter_slots=2, kv_bytes=1 << 20)
    batches = [commands(s, [ref, s.refs[i - 1], None]) for i, ref in enumerate(s.refs)]
    plain = [logits_of(s, asked, monkeypatch, recorded=False) for asked in batches]
    recorded = [logits_of(s, asked, monkeypatch, recorded=True) for asked in batches]
    assert programs(s).runs > 20
    whole = [need for need in programs(s).recorded if need.tokens == 3 and not need.multi_token_rows]
    assert 0 < len(whole) < len(batches), "several batches shared a program"
    banks = {bank for need in programs(s).recorded for bank, _ in need.affine}
    assert banks <= set(s.engine.model.step.banks.values()), "steps that are timed are not recorded"
    for before, after in zip(plain, recorded, strict=True):
        assert all(torch.equal(before[row], after[row]) for row in before)


def test_guesses_are_in_programs_too(stand: Callable[..., Stand], monkeypatch: pytest.MonkeyPatch) -> None:
    s = stand("llama", 3)
    sampling = Sampling(max_tokens=40, temperature=0.0, ignore_eos=True, logit_bias={5: 60.0, 6: 60.0})
    asked = [Generate(f"{i}", "t", [5, 6, 7, 8] * 6 + [i], sampling, ref) for i, ref in enumerate(s.refs)]
    with monkeypatch.context() as patched:
        patched.setattr(programs(s), "run", lambda *_: None)
        expected = run(s.engine, asked)
    guessed = s.engine.counts["guessed_right"]
    assert guessed > 0
    for _ in range(2):
        for done, before in zip(run(s.engine, asked), expected, strict=True):
            same(done, before)
    assert any(need.multi_token_rows for need in programs(s).recorded)


def test_prompts_come_in_programs_beside_rows_that_decode(
    stand: Callable[..., Stand], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "server.engine.metrics.step_timer.SAMPLE_EVERY", 1 << 30
    )  # steps that are timed are not recorded
    s = stand("llama", 2, lookup_tokens=0, prefix_cache=False)
    s.engine.model.step.limit_in_place(64 * 64)
    sampling = Sampling(max_tokens=12, temperature=0.0, ignore_eos=True)
    lengths = (5, 40, 150, 20)  # the third is long: while its chunk is computed, all goes layer by layer
    asked = [Generate(f"{i}", "t", s.prompt(i, n), sampling, s.refs[i % 2]) for i, n in enumerate(lengths)]

    def in_turn(*, recorded: bool) -> dict[str, torch.Tensor]:
        with monkeypatch.context() as patched:
            if not recorded:
                patched.setattr(programs(s), "run", lambda *_: None)
            patched.setattr(s.engine.model, "forward", s.engine.model.forward)
            found = record_logits(s.engine)
            for command in asked:
                s.engine.submit(command)
                s.engine.step()
                s.engine.step()
            while s.engine.scheduler.running:
                s.engine.step()
            return {row: torch.stack(own) for row, own in found.items()}

    logits_of(s, commands(s, [*s.refs]), monkeypatch, recorded=False)  # their adapters are here from now on
    plain = in_turn(recorded=False)
    assert programs(s).runs == 0
    recorded = in_turn(recorded=True)
    assert {need.tokens for need in programs(s).recorded if need.multi_token_rows} == {5, 41, 23}
    assert all(torch.equal(plain[row], recorded[row]) for row in plain)


def test_what_takes_python_runs_layer_by_layer(stand: Callable[..., Stand]) -> None:
    s = stand("llama", 1, lookup_tokens=0)
    ia3 = kinds(s, ["ia3"])["ia3"]
    run(s.engine, commands(s, [ia3]))  # from here on it is loaded: the rows below go step by step together
    run(s.engine, commands(s, [ia3, None]))
    assert programs(s).runs == 0
    run(s.engine, commands(s, [s.refs[0], None]))
    assert programs(s).runs > 0


def test_biases_alone_need_no_launch_of_their_own(stand: Callable[..., Stand]) -> None:
    s = stand("llama", 1, lookup_tokens=0)
    bitfit = kinds(s, ["bitfit"])["bitfit"]
    for refs in ([None, None], [bitfit, bitfit], [s.refs[0], None]):
        run(s.engine, commands(s, [*refs]))
        run(s.engine, commands(s, [*refs]))
    launches = {
        (bool(need.affine), any(trace.mask for _, trace in need.affine)): program.launches
        for need, (program, _) in programs(s).recorded.items()
        if need.tokens == 2
    }
    base, biased, lora = launches[False, False], launches[True, False], launches[True, True]
    assert biased == base
    assert lora > base


def test_few_programs_are_kept(stand: Callable[..., Stand], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.engine.cpu.recorded_steps.MAX_RECORDED", 2)
    s = stand("llama", 2, lookup_tokens=0)
    for count in (1, 2, 3, 4):
        run(s.engine, commands(s, [*s.refs, None, None][:count]))
    assert len(programs(s).recorded) == 2
