"""The sampler against slow, obvious references, and against its own promise that rows are strangers."""

import math
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from server.engine.sampler import Sampled, SampleRow, _last_tokens, draw, uniform
from server.messages import Sampling

V = 1000


def row(seed: int = 0, *, prompt: Any = (), output: Any = (), banned: Any = (), **knobs: Any) -> SampleRow:
    return SampleRow(Sampling(max_tokens=1, **knobs), seed, prompt, output, banned)


def logits(rows: int, vocabulary: int = V, seed: int = 0) -> torch.Tensor:
    return 3 * torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed))


def sample(x: torch.Tensor, rows: list[SampleRow]) -> list[Sampled]:
    return draw(x, rows).read()


def draws(x: torch.Tensor, n: int, **knobs: Any) -> Counter[int]:
    """Tokens of n rows that share logits x [V] and knobs, and differ in seed only."""
    rows = [row(seed, **knobs) for seed in range(n)]
    return Counter(s.token for s in sample(x.expand(n, -1).clone(), rows))


def reference_probs(x: torch.Tensor, r: SampleRow) -> torch.Tensor:
    """The distribution of the next token [V], float64, one plain step after another."""
    s, x = r.sampling, x.double().clone()
    for token, bias in s.logit_bias.items():
        x[token] += bias
    for token in r.banned:
        x[token] = -math.inf
    for token in {*r.prompt, *r.output}:
        x[token] = x[token] / s.repetition_penalty if x[token] > 0 else x[token] * s.repetition_penalty
    for token, times in Counter(r.output).items():
        x[token] -= s.presence_penalty + times * s.frequency_penalty
    if s.temperature == 0:
        return torch.nn.functional.one_hot(x.argmax(), len(x)).double()
    p = (x / s.temperature).softmax(0)
    p[p < s.min_p * p.max()] = 0
    if s.top_k:
        p[p < p.sort(descending=True).values[min(s.top_k, len(p)) - 1]] = 0
    p /= p.sum()
    ordered, ids = p.sort(descending=True)
    p[ids[ordered.cumsum(0) - ordered >= s.top_p]] = 0
    return p / p.sum()


def chi_square(found: Counter[int], expected: torch.Tensor) -> float:
    """How many standard deviations the statistic lies above its mean; tokens too rare to count are pooled."""
    n = sum(found.values())
    assert all(expected[token] > 0 for token in found), "drew a token of probability zero"
    common = [t for t in range(len(expected)) if expected[t] * n >= 5]
    cells = [(found[t], float(expected[t]) * n) for t in common]
    rest = n - sum(e for _, e in cells)
    if rest > 1e-6 * n:
        cells.append((n - sum(o for o, _ in cells), rest))
    freedom = max(len(cells) - 1, 1)
    statistic = sum((o - e) ** 2 / e for o, e in cells)
    return (statistic - freedom) / math.sqrt(2 * freedom)


KNOBS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.5},
    {"temperature": 2.0},
    {"top_k": 1},
    {"top_k": 7},
    {"top_k": 600},
    {"top_k": V + 5},
    {"top_p": 0.9},
    {"top_p": 0.2},
    {"top_p": 0.0001},
    {"top_p": 0.999, "temperature": 3.0},
    {"min_p": 0.1},
    {"min_p": 1.0},
    {"top_k": 40, "top_p": 0.8, "min_p": 0.02, "temperature": 1.3},
    {"top_k": 400, "top_p": 0.7, "temperature": 4.0},
    {"logit_bias": {5: 9.0, 7: -100.0}},
    {"repetition_penalty": 1.5, "presence_penalty": 0.7, "frequency_penalty": 0.4, "logit_bias": {3: 8.0}},
]


@pytest.mark.parametrize("knobs", KNOBS, ids=str)
def test_draws_follow_the_distribution(knobs: dict[str, Any]) -> None:
    x = logits(1)[0]
    best = x.topk(6).indices.tolist()
    history: dict[str, Any] = {"prompt": best[:2], "output": [*best[2:5], best[3]], "banned": [best[5]]}
    expected = reference_probs(x, row(**history, **knobs))
    assert chi_square(draws(x, 4000, **history, **knobs), expected) < 4


def test_a_wrong_distribution_would_be_noticed() -> None:
    x = logits(1)[0]
    assert chi_square(draws(x, 4000, temperature=1.05), reference_probs(x, row())) > 4


def test_steps_of_one_row_follow_the_distribution() -> None:
    """Along one sequence the uniforms come from one seed and a counter."""
    x = logits(1, 50)[0]
    rows = [row(7, output=[0] * step) for step in range(2000)]
    found = Counter(s.token for s in sample(x.expand(2000, -1).clone(), rows))
    assert chi_square(found, reference_probs(x, row())) < 4


@given(st.integers(-(2**63), 2**64), st.integers(0, 2**20), st.integers(0, 50))
def test_uniform_is_a_number_float32_holds(seed: int, step: int, attempt: int) -> None:
    u = uniform(seed, step, attempt)
    assert 0 <= u < 1
    assert torch.tensor(u, dtype=torch.float32).item() == u


def test_uniform_differs_by_seed_step_and_attempt() -> None:
    numbers = {uniform(a, b, c) for a in range(10) for b in range(10) for c in range(10)}
    assert len(numbers) == 1000


SAMPLING = st.builds(
    Sampling,
    max_tokens=st.just(1),
    temperature=st.sampled_from([0.0, 0.3, 1.0, 2.0]),
    top_p=st.sampled_from([0.0001, 0.5, 0.95, 1.0]),
    top_k=st.sampled_from([0, 1, 30, 500]),
    min_p=st.sampled_from([0.0, 0.05]),
    presence_penalty=st.sampled_from([0.0, -2.0, 1.0]),
    frequency_penalty=st.sampled_from([0.0, 0.5]),
    repetition_penalty=st.sampled_from([1.0, 0.7, 1.3]),
    logit_bias=st.dictionaries(st.integers(0, V - 1), st.floats(-100, 100), max_size=3),
    logprobs=st.sampled_from([None, 0, 3]),
)
TOKENS = st.lists(st.integers(0, V - 1), max_size=12)
ROW = st.builds(
    SampleRow, SAMPLING, st.integers(0, 2**40), TOKENS, TOKENS, st.lists(st.integers(0, V - 1), max_size=2)
)


@settings(max_examples=60, deadline=None)
@given(st.lists(ROW, min_size=2, max_size=9), st.integers(0, 1000))
def test_a_row_gets_the_same_alone_and_in_any_batch(rows: list[SampleRow], seed: int) -> None:
    x = logits(len(rows), seed=seed)
    together = sample(x.clone(), rows)
    assert together == [sample(x[i : i + 1].clone(), [r])[0] for i, r in enumerate(rows)]
    assert together[::-1] == sample(x.flip(0).clone(), rows[::-1])


@settings(max_examples=60, deadline=None)
@given(ROW, st.integers(0, 1000))
def test_greedy_and_support_match_the_reference(r: SampleRow, seed: int) -> None:
    x = logits(1, seed=seed)
    expected = reference_probs(x[0], r)
    assert expected[sample(x.clone(), [r])[0].token] > 0


def test_a_flat_row_of_the_whole_vocabulary() -> None:
    """Ties everywhere: every token is as likely as the k-th and as the first."""
    found = draws(torch.zeros(64), 3000, top_k=3, top_p=0.1)
    assert chi_square(found, torch.full((64,), 1 / 64)) < 4


def test_temperature_near_zero_is_greedy() -> None:
    x = logits(1)
    assert sample(x.clone(), [row(temperature=1e-40)])[0].token == int(x.argmax())


def test_a_nucleus_of_nothing_is_greedy() -> None:
    x = logits(1)
    assert {sample(x.clone(), [row(seed, top_p=0.0)])[0].token for seed in range(20)} == {int(x.argmax())}


@pytest.mark.parametrize(
    ("words", "output", "banned"),
    [
        ([(7,)], [], [7]),
        ([(7,), (1, 2)], [1], [7, 2]),
        ([(1, 2)], [], []),
        ([(1, 2)], [1, 3], []),
        ([(1, 1, 2), (1, 2), (3, 1, 2)], [1, 1], [2, 2]),
        ([(1, 2, 3, 4)], [2, 3], []),
    ],
)
def test_a_bad_word_bans_the_token_that_would_complete_it(
    words: list[tuple[int, ...]], output: list[int], banned: list[int]
) -> None:
    assert _last_tokens(words, output) == banned


def test_a_banned_token_is_never_chosen() -> None:
    x = torch.zeros(1, 4)
    x[0, 2] = 50
    assert sample(x.clone(), [row(temperature=0.0)])[0].token == 2
    for knobs in ({"temperature": 0.0}, {}, {"logit_bias": {2: 100.0}}):
        assert sample(x.clone(), [row(banned=[2], **knobs)])[0].token != 2


def test_the_last_token_is_reachable_and_masked_ones_are_not() -> None:
    x = torch.full((1, 8), -math.inf)
    x[0, 3] = x[0, 7] = 1.0
    found = Counter(s.token for seed in range(200) for s in sample(x.clone(), [row(seed)]))
    assert set(found) == {3, 7}


def test_logprobs_are_those_of_the_raw_logits() -> None:
    x = logits(2)
    raw = x.log_softmax(-1)
    best = int(x[0].argmax())
    knobs: dict[str, Any] = {"temperature": 0.0, "logit_bias": {best: -100.0}, "repetition_penalty": 1.3}
    first, second = sample(x.clone(), [row(logprobs=4, prompt=[1], **knobs), row(logprobs=0)])
    assert first.token != best
    assert first.logprobs is not None
    assert first.logprobs.logprob == pytest.approx(raw[0, first.token].item())
    values, ids = raw[0].topk(4)
    assert [t for t, _ in first.logprobs.top] == ids.tolist()
    assert [v for _, v in first.logprobs.top] == pytest.approx(values.tolist())
    assert second.logprobs is not None
    assert second.logprobs.top == []
    assert second.logprobs.logprob == pytest.approx(raw[1, second.token].item())


def test_logprobs_leave_out_what_was_masked() -> None:
    x = torch.tensor([[1.0, -math.inf, 2.0]])
    (only,) = sample(x, [row(logprobs=3)])
    assert only.logprobs is not None
    assert [t for t, _ in only.logprobs.top] == [2, 0]


@pytest.mark.parametrize(
    "knobs", [{"temperature": 0.0}, {}, {"top_p": 0.5}, {"top_k": 5, "min_p": 0.1}], ids=str
)
@pytest.mark.parametrize("poison", ["nan", "one nan", "inf", "all -inf"])
def test_a_row_that_is_not_finite_is_flagged_alone(knobs: dict[str, Any], poison: str) -> None:
    clean = logits(5)
    bad = clean.clone()
    match poison:
        case "nan":
            bad[2] = math.nan
        case "one nan":
            bad[2, 17] = math.nan
        case "inf":
            bad[2, 17] = math.inf
        case _:
            bad[2] = -math.inf
    rows = [row(i, logprobs=2, output=[1, 2], presence_penalty=0.5, **knobs) for i in range(5)]
    expected, found = sample(clean, rows), sample(bad, rows)
    assert [s.finite for s in found] == [True, True, False, True, True]
    assert found[2].logprobs is None
    assert 0 <= found[2].token < V
    assert [s for s in found if s.finite] == [s for i, s in enumerate(expected) if i != 2]


def test_a_token_out_of_range_raises_and_spares_the_neighbour() -> None:
    x = logits(2)
    with pytest.raises(IndexError):
        sample(x, [row(logit_bias={V: 1.0}), row()])


def test_no_rows() -> None:
    assert sample(torch.empty(0, V), []) == []


def test_the_global_generator_is_not_touched() -> None:
    before = torch.get_rng_state()
    sample(logits(3), [row(i, top_p=0.9) for i in range(3)])
    assert torch.equal(before, torch.get_rng_state())


def test_preemption_and_resumption_repeat_the_token() -> None:
    """A row that lost its place comes back with the same history and gets the same token."""
    x = logits(1)
    r = row(11, output=[3, 4, 5])
    assert sample(x.clone(), [r]) == sample(x.clone(), [replace(r, output=list(r.output))])


@given(
    st.integers(1, 4),
    st.integers(1, 1100),
    st.integers(0, 2**16),
    st.sampled_from([None, math.nan, math.inf]),
)
@settings(deadline=None)
def test_greedy_rows_take_the_first_of_the_highest(
    rows: int, vocabulary: int, seed: int, poison: float | None
) -> None:
    """Among whole numbers, of which many are alike; by stretches or at once, with a rest or without."""
    x = logits(rows, vocabulary, seed).round().clamp(-3, 3)
    x[:, ::7] = -math.inf  # what a grammar forbids
    x[:, seed % vocabulary] = 0
    if poison is not None:
        x[seed % rows, seed % vocabulary] = poison
    whole = [not (own.isnan() | (own == math.inf)).any() for own in x]
    found = sample(x.clone(), [row(temperature=0.0)] * rows)
    assert [s.finite for s in found] == whole
    first = [int((own == own.max()).nonzero()[0, 0]) for own, fine in zip(x, whole, strict=True) if fine]
    assert [s.token for s in found if s.finite] == first
