"""Prompt logprobs: those of the same tokens when they are generated, whatever the batch and the chunks."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from server.engine import prompt_logprobs
from server.engine.prompt_logprobs import PromptScorer
from server.messages import AdapterRef, Generate, Sampling
from tests.fixtures.engine import Stand, run
from tests.server.engine.scores import Scores, ScoringDriver, score
from tests.server.engine.test_mixed_methods import kinds

NEW = 21
ONLY = Sampling(max_tokens=0, temperature=0.0, prompt_logprobs=3, seed=0)


def generated(s: Stand, i: int, ref: AdapterRef | None) -> tuple[list[int], list[Any]]:
    """A prompt and what follows it, and the logprobs of what follows."""
    sampling = Sampling(max_tokens=NEW, temperature=1.0, logprobs=3, ignore_eos=True, seed=i)
    prompt = s.prompt(i, (3, 16, 17, 33)[i % 4])
    (done,) = run(s.engine, [Generate(f"generate-{i}", "tenant", prompt, sampling, ref)])
    return prompt + done.tokens, done.logprobs


def close(found: Scores, logprobs: list[Any]) -> None:
    """The last of the scores are these logprobs."""
    n = len(logprobs)
    assert found.logprobs[-n:] == pytest.approx([each.logprob for each in logprobs], abs=1e-4)
    for top, each in zip(found.tops[-n:], logprobs, strict=True):
        assert [t for t, _ in top] == [t for t, _ in each.top]
        assert [p for _, p in top] == pytest.approx([p for _, p in each.top], abs=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_every_kind_of_adapter_in_one_batch(stand: Callable[..., Stand], family: str) -> None:
    """Beside rows that decode, with prefixes in the cache, and in slices of three positions."""
    s = stand(family, 0, max_batch_tokens=48)
    s.engine.model.scorer._positions = 3
    refs = [None, *kinds(s).values()]
    texts = [generated(s, i, ref) for i, ref in enumerate(refs)]
    others = [s.generate(i, ref) for i, ref in enumerate(refs)]
    commands = [
        Generate(f"score-{i}", "tenant", text, ONLY, ref)
        for i, ((text, _), ref) in enumerate(zip(texts, refs, strict=True))
    ]
    driver = ScoringDriver(s.engine)
    for other, command in zip(others, commands, strict=True):
        driver.submit(other)
        driver.submit(command)
    driver.finish()
    for command, (text, logprobs) in zip(commands, texts, strict=True):
        done, found = driver.rows[command.id], driver.scores[command.id]
        assert (done.error, done.finish, done.tokens) == (None, "length", [])
        assert len(found.logprobs) == len(text) - 1
        close(found, logprobs)
    assert s.engine.blocks.available == s.engine.blocks.count


def test_ranks_and_equal_floats(stand: Callable[..., Stand]) -> None:
    """A token that is the likeliest has rank 1 and the very number that stands first among the best."""
    s = stand("llama", 0)
    greedy = Sampling(max_tokens=20, temperature=0.0, ignore_eos=True, seed=0)
    (done,) = run(s.engine, [Generate("greedy", "tenant", s.prompt(0, 9), greedy)])
    (found,) = score(s.engine, [Generate("score", "tenant", s.prompt(0, 9) + done.tokens, ONLY)])
    assert found.ranks[-20:] == [1] * 20
    assert found.logprobs[-20:] == [top[0][1] for top in found.tops[-20:]]
    for logprob, rank, top in zip(found.logprobs, found.ranks, found.tops, strict=True):
        assert rank == 1 + sum(other > logprob for _, other in top) or rank > len(top)


@pytest.mark.parametrize("k", [0, 1, 10_000])
def test_counts_of_alternatives(stand: Callable[..., Stand], k: int) -> None:
    s = stand("llama", 0)
    prompt = s.prompt(1, 20)
    sampling = Sampling(max_tokens=1, temperature=0.0, prompt_logprobs=k, seed=0)
    (found,) = score(s.engine, [Generate("row", "tenant", prompt, sampling)])
    vocabulary = s.engine.base.vocab_size
    assert {len(top) for top in found.tops} == {min(k, vocabulary)}
    if k > vocabulary:
        total = torch.tensor([[p for _, p in top] for top in found.tops]).exp().sum(-1)
        assert total.tolist() == pytest.approx([1.0] * 19, abs=1e-5)


def test_a_preempted_row_sends_each_score_once(stand: Callable[..., Stand]) -> None:
    """Rows lose their blocks in mid prompt; what they had sent is neither sent again nor lost."""
    s = stand("llama", 0, max_batch_tokens=16)
    prompt = s.prompt(3, 100)
    command = Generate("row", "tenant", prompt, ONLY)
    (expected,) = score(s.engine, [command])
    driver = ScoringDriver(s.engine)
    driver.submit(command)
    preempted_at: set[int] = set()
    while s.engine.busy:
        driver.step()
        row = s.engine.scheduler.running.get("row")
        if row and row.computed < 80 and row.computed not in preempted_at:
            preempted_at.add(row.computed)
            s.engine.scheduler._preempt(row, 0.0)
    assert len(preempted_at) > 1
    found = driver.scores["row"]
    assert found.logprobs == pytest.approx(expected.logprobs, abs=1e-5)
    assert [[t for t, _ in top] for top in found.tops] == [[t for t, _ in top] for top in expected.tops]


def test_a_prompt_seen_before_is_scored_whole(stand: Callable[..., Stand]) -> None:
    """The prefix cache holds no logits: a row that asks for scores computes its prompt again, and says so."""
    s = stand("llama", 0)
    commands = [Generate(f"row-{i}", "tenant", s.prompt(4, 80), ONLY) for i in range(2)]
    first, second = (score(s.engine, [command])[0] for command in commands)
    assert second.logprobs == pytest.approx(first.logprobs, abs=1e-5)
    plain = Sampling(max_tokens=1, temperature=0.0, seed=0)
    scored, cached = run(
        s.engine,
        [
            Generate("again", "tenant", s.prompt(4, 80), ONLY),
            Generate("plain", "tenant", s.prompt(4, 80), plain),
        ],
    )
    assert (scored.cached_tokens, cached.cached_tokens) == (0, 64)


def test_no_step_keeps_more_logits_than_a_slice(
    stand: Callable[..., Stand], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prompt_logprobs, "MAX_LOGIT_BYTES", 1 << 14)
    s = stand("llama", 0, max_batch_tokens=48)
    most = (1 << 14) // (4 * s.engine.base.vocab_size)
    shapes: list[int] = []
    head = s.engine.model.scorer._head
    logits = head.logits

    def counted(hidden: torch.Tensor) -> torch.Tensor:
        shapes.append(len(hidden))
        return logits(hidden)

    monkeypatch.setattr(head, "logits", counted)
    (found,) = score(s.engine, [Generate("row", "tenant", s.prompt(5, 200), ONLY)])
    assert len(found.logprobs) == 199 == sum(shapes)
    assert max(shapes) <= most < 48
    assert found.largest <= 48, "a message holds one step's"


def test_rows_that_do_not_ask_cost_nothing(
    stand: Callable[..., Stand], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing of the scorer is called, nor is a hook left behind by rows that asked before."""
    s = stand("llama", 0)
    score(s.engine, [Generate("asks", "tenant", s.prompt(6, 40), ONLY)])
    assert not s.engine.model.scorer._head.decoder._forward_hooks

    def called(*_: object) -> None:
        raise AssertionError("a row that did not ask was scored")

    for name in ("capture", "begin"):
        monkeypatch.setattr(PromptScorer, name, called)
    plain = Sampling(max_tokens=5, temperature=0.0, logprobs=1, ignore_eos=True, seed=0)
    (done,) = run(s.engine, [Generate("plain", "tenant", s.prompt(6, 40), plain)])
    assert (done.error, len(done.tokens), len(done.logprobs)) == (None, 5, 5)


def test_a_prompt_that_fills_the_context(stand: Callable[..., Stand]) -> None:
    s = stand("llama", 0, max_model_len=64)
    (found,) = score(s.engine, [Generate("full", "tenant", s.prompt(7, 64), ONLY)])
    assert len(found.logprobs) == 63
    (single,) = run(s.engine, [Generate("one", "tenant", s.prompt(7, 1), ONLY)])
    assert (single.finish, single.tokens) == ("length", [])
    (long,) = run(s.engine, [Generate("long", "tenant", s.prompt(7, 65), ONLY)])
    assert long.error is not None
    assert long.error[0] == "context_length_exceeded"


def test_scores_that_are_not_finite_end_the_row(
    stand: Callable[..., Stand], monkeypatch: pytest.MonkeyPatch
) -> None:
    s = stand("llama", 0)
    logits = s.engine.model.scorer._head.logits
    monkeypatch.setattr(
        s.engine.model.scorer._head,
        "logits",
        lambda hidden: logits(hidden).index_fill(0, torch.tensor(0), torch.nan),
    )
    plain = Generate("plain", "tenant", s.prompt(8, 20), Sampling(max_tokens=3, temperature=0.0, seed=0))
    bad, good = run(s.engine, [Generate("bad", "tenant", s.prompt(8, 20), ONLY), plain])
    assert bad.error is not None
    assert bad.error[0] == "non_finite_logits"
    assert (good.error, len(good.tokens)) == (None, 3)
