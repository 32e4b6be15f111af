"""Guesses at what comes next: sooner where a text repeats itself, and never another answer."""

from collections.abc import Callable, Iterable
from typing import Any

import pytest

from server.engine.scheduling.prompt_lookup import PromptLookup
from server.engine.scheduling.step_cost import StepCost
from server.messages import AdapterRef, Generate, Sampling
from tests.fixtures.engine import Stand, run, same
from tests.server.engine.test_mixed_methods import kinds

REPEATED = [5, 6, 7, 8, 9, 10, 11, 12] * 5


def test_what_followed_the_last_time_is_guessed() -> None:
    tokens = [1, 2, 3, 50, 51, 52, 9, 1, 2, 3, 60, 61, 62, 9, 1, 2, 3]
    assert PromptLookup(hit_rate=0.9).draft(tokens, 3, 0.1) == [60, 61, 62]
    assert PromptLookup(hit_rate=0.9).draft(tokens, 2, 0.1) == [60, 61]
    assert PromptLookup().draft([1, 2, 3, 4, 5, 6], 7, 0.1) == []
    assert PromptLookup().draft([1, 1], 7, 0.1) == []


def test_what_repeats_itself_goes_on_for_as_long_as_it_may() -> None:
    again = [9, 8, 7] * 9
    assert PromptLookup().draft([1, 2, *again], 7, 0.1) == [9, 8, 7, 9, 8, 7, 9]
    assert PromptLookup().draft([4] * 40, 5, 0.1) == [4] * 5
    assert PromptLookup(hit_rate=1.0).draft([4] * 40, 5, 0.99) == [4] * 5


@pytest.fixture(autouse=True)
def guesses_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    """On whatever machine, beside whatever else runs on it."""
    monkeypatch.setattr("server.engine.engine.StepCost", lambda: StepCost({1: 1.0, 64: 4.0}))


def test_new_tokens_are_read_once() -> None:
    lookup, tokens = PromptLookup(), list(REPEATED)
    lookup.draft(tokens, 7, 0.1)
    tokens += [99, 98, 97, 96, 95, 99, 98, 97]
    assert lookup.draft(tokens, 2, 0.1) == [96, 95]
    assert lookup.num_indexed == len(tokens)


def test_it_learns_how_far_it_is_worth_to_guess_without_guessing() -> None:
    lookup = PromptLookup()
    lookup.draft(REPEATED, 7, 0.9)
    assert lookup.hit_rate > 0.9
    assert len(lookup.draft(REPEATED, 7, 0.1)) == 7
    assert 0 < len(lookup.draft(REPEATED, 7, 0.97)) < 7, "a large batch asks for more"
    tokens = list(REPEATED)
    for i in range(40):  # after what has stood there comes something else each time
        tokens += [5, 6, 7, 100 + i]
    lookup.draft(tokens, 7, 0.9)
    assert lookup.draft([*tokens, 5, 6, 7], 7, 0.9) == []
    assert PromptLookup(hit_rate=0.0).draft(REPEATED[:12], 7, 0.5) == []
    assert PromptLookup(hit_rate=1.0).draft(REPEATED, 7, 1.0) == [], "where not even a sure one pays"


def asked(refs: Iterable[AdapterRef | None], **sampling: Any) -> list[Generate]:
    """A row for each; its prompt is a repetition, its answer of few tokens: guesses are right and wrong."""
    few = dict.fromkeys(REPEATED[:3], 50.0)
    usual: dict[str, Any] = {"max_tokens": 48, "temperature": 0.0, "ignore_eos": True, "logit_bias": few}
    own = Sampling(**(usual | sampling))
    return [Generate(str(i), "tenant", [*REPEATED, i], own, ref) for i, ref in enumerate(refs)]


@pytest.mark.parametrize(
    ("guessed", "sampling"),
    [
        (True, {}),
        (True, {"logprobs": 3}),
        (True, {"temperature": 0.5, "top_p": 0.9, "seed": 5}),
        (True, {"repetition_penalty": 1.1, "presence_penalty": 0.5, "frequency_penalty": 0.2}),
        (True, {"max_tokens": 12, "min_tokens": 11, "stop_token_ids": [REPEATED[0]]}),
        (False, {"temperature": 1.0, "logit_bias": {}}),
    ],
)
def test_guesses_change_no_answer(
    stand: Callable[..., Stand], guessed: bool, sampling: dict[str, Any]
) -> None:
    with_, without = stand("llama", 0), stand("llama", 0, lookup_tokens=0)
    rows = [run(s.engine, asked([*kinds(s).values(), None], **sampling)) for s in (with_, without)]
    for found, expected in zip(*rows, strict=True):
        assert expected.error is None
        same(found, expected)
    counts = with_.engine.counts
    if guessed:
        assert counts["guessed_right"] > 0, "or this tests nothing"
        # the row that a stop token ends has few drafts, and which are made depends on measured step times
        refused = counts["guessed_tokens"] - counts["guessed_right"]
        assert refused > 0 or "stop_token_ids" in sampling
    assert not without.engine.counts["guessed_tokens"]
    assert with_.engine.blocks.available == with_.engine.blocks.count


def test_text_that_repeats_itself_takes_fewer_steps(stand: Callable[..., Stand]) -> None:
    s = stand("llama", 0)
    (done,) = run(s.engine, asked([None], logit_bias={REPEATED[0]: 100.0}))
    counts = s.engine.counts
    assert done.tokens == REPEATED[:1] * 48
    assert counts["steps"] < 15
    assert counts["generation_tokens"] == 48
    assert counts["guessed_right"] == 48 - counts["steps"]


def test_a_stop_token_ends_the_row_where_it_stands(stand: Callable[..., Stand]) -> None:
    s = stand("llama", 0)
    (whole,) = run(s.engine, asked([None]))
    for token in set(whole.tokens):
        (cut,) = run(s.engine, asked([None], stop_token_ids=[token]))
        assert (cut.tokens, cut.finish) == (whole.tokens[: whole.tokens.index(token)], "stop")


def test_memory_that_is_short_is_not_spent_on_guesses(stand: Callable[..., Stand]) -> None:
    tight, roomy = stand("llama", 0, kv_bytes=1 << 20, max_seqs=8), stand("llama", 0)
    rows = [run(s.engine, asked([None] * 12, max_tokens=90)) for s in (tight, roomy)]
    for found, expected in zip(*rows, strict=True):
        same(found, expected)
    assert tight.engine.counts["guessed_right"]
    assert tight.engine.blocks.available == tight.engine.blocks.count
