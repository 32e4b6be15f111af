import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from server.finetune.data.examples import Example
from server.finetune.modeling.adapter_model import AdapterModel
from server.finetune.training import evaluation as module
from server.finetune.training.evaluation import EvalScores, compare, score
from server.finetune.training.observer import TrainingLog
from tests.fixtures.models import Oracle, greedy
from tests.server.finetune.small_trainings import examples, recipe
from tests.server.finetune.training.test_observer import history

NOTHING = TrainingLog()


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Models this small only wait for a second one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def llama(tiny_models: Callable[[str], Path]) -> Path:
    return tiny_models("llama")


@pytest.fixture(scope="module")
def model(llama: Path) -> AdapterModel:
    """A LoRA that is far from the base."""
    model = AdapterModel(llama, "tiny", recipe())
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.params.values():
            parameter.normal_(0, 0.2)
    return model


@pytest.fixture(scope="module")
def oracle(llama: Path) -> Oracle:
    return Oracle(llama)


def losses_of(model: Any, example: Example) -> torch.Tensor:
    """Of every token but the first."""
    logits = model(torch.tensor([example.tokens])).logits[0, :-1]
    return torch.nn.functional.cross_entropy(logits, torch.tensor(example.tokens[1:]), reduction="none")


@pytest.mark.parametrize("adapted", [False, True])
def test_scores_are_what_peft_gives_one_at_a_time(
    model: AdapterModel, oracle: Oracle, tmp_path: Path, adapted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PACK_TOKENS", 30)
    model.save(tmp_path)
    some = [*examples(12), Example([4, 5, 6, 7], [0.0, 1.0, 0.0, 0.5])]
    found = score(model, some, adapted=adapted)
    with oracle.using(tmp_path if adapted else None) as theirs:
        for i, example in enumerate(some):
            weights = torch.tensor(example.weights[1:])
            losses = losses_of(theirs, example)
            assert found.losses[i] == pytest.approx(float((losses * weights).sum()), rel=1e-4)
            assert found.weights[i] == float(weights.sum())
            assert found.targets[i] == int((weights > 0).sum())
    assert found.loss == pytest.approx(sum(found.losses) / sum(found.weights))


def test_an_answer_is_exact_if_greedy_decoding_gives_it(model: AdapterModel, oracle: Oracle) -> None:
    questions = [e.tokens[: e.prompt_length] for e in examples(6)]
    with oracle.using(None) as base:
        answers = [greedy(base, question, 3)[0] for question in questions]
    some = []
    for question, answer in zip(questions, answers, strict=True):
        for given in (answer, [*answer[:2], (answer[2] + 1) % 300], [(answer[0] + 1) % 300, *answer[1:]]):
            # an earlier answer, which has nothing to do with it
            weights = [0.0, 1.0] + [0.0] * (len(question) - 2) + [1.0] * 3
            some.append(Example(question + given, weights, len(question), "label"))
    assert score(model, some, adapted=False).exact == [True, False, False] * 6


def test_scoring_draws_no_random_number_and_drops_nothing_out(model: AdapterModel) -> None:
    model.train()
    before = torch.random.get_rng_state()
    once, twice = score(model, examples(5)), score(model, examples(5))
    assert once == twice
    assert torch.equal(torch.random.get_rng_state(), before)
    assert model.training


def classified(count: int, labels: dict[str, list[int]]) -> list[Example]:
    made = []
    for i, e in enumerate(examples(count)):
        label = list(labels)[i % len(labels)]
        question = e.tokens[: e.prompt_length]
        answer = labels[label]
        weights = [0.0] * len(question) + [1.0] * len(answer)
        made.append(Example(question + answer, weights, len(question), label))
    return made


LABELS = {"good": [20, 21, 0], "bad": [30, 0], "neither": [40, 41, 42, 0]}


def test_accuracy_by_label_is_by_the_likeliest_of_all_labels(
    model: AdapterModel, oracle: Oracle, tmp_path: Path
) -> None:
    some = classified(12, LABELS)
    record = compare(model, some, some, NOTHING, 12)
    model.save(tmp_path)
    expected: dict[str, dict[str, int]] = {label: {"base": 0, "adapter": 0} for label in LABELS}
    for side, adapter in (("base", None), ("adapter", tmp_path)):
        with oracle.using(adapter) as theirs:
            for example in some:
                n = example.prompt_length
                sums = {}
                for label, answer in LABELS.items():
                    whole = Example(example.tokens[:n] + answer, [])
                    sums[label] = float(losses_of(theirs, whole)[n - 1 :].sum())
                best = min(sums, key=lambda label: sums[label])
                expected[str(example.label)][side] += best == example.label
    lines = {line.pop("label"): line for line in record["labels"]}
    assert lines == {label: {"examples": 4} | sides for label, sides in expected.items()}
    for side in ("base", "adapter"):
        assert record[side]["label_accuracy"] == sum(line[side] for line in lines.values()) / 12


def test_the_record_sets_base_and_adapter_side_by_side(model: AdapterModel) -> None:
    some = examples(9)
    gone = history([3.0, 2.0, 1.0, 0.5], {2: 2.0, 4: 3.0})
    record = json.loads(json.dumps(compare(model, some, some, gone, 4)))
    base, adapter = score(model, some, adapted=False), score(model, some)
    for side, scores in (("base", base), ("adapter", adapter)):
        assert record[side] == {
            "loss": scores.loss,
            "perplexity": math.exp(scores.loss),
            "token_accuracy": scores.accuracy,
        }
    assert record["improvement"] == pytest.approx(base.loss - adapter.loss)
    assert record["better"] is (record["improvement"] > 1.645 * record["noise"])
    assert record["base_loss"] == score(model, some[:4], adapted=False).loss
    assert (record["examples"], record["targets"]) == (9, sum(base.targets))
    assert (record["best_step"], record["last_step"], record["overfitted"]) == (2, 4, True)
    assert record["curve"] == gone.curve()
    assert record["labels"] == []


@pytest.mark.parametrize(
    ("gains", "better"),
    [
        ([0.5] * 4, True),
        ([-0.5] * 4, False),
        ([0.0] * 4, False),
        ([3.0, -2.5, 3.0, -2.5], False),  # 0.25 better on average, which chance gives as well
        ([0.3, 0.2, 0.25, 0.2], True),
        ([0.1], True),  # of one example alone there is no noise to know
        ([-0.1], False),
    ],
)
def test_better_is_more_than_noise(
    model: AdapterModel, monkeypatch: pytest.MonkeyPatch, gains: list[float], better: bool
) -> None:
    n = len(gains)

    def given(_model: Any, _examples: Any, *, adapted: bool = True) -> EvalScores:
        losses = [2.0 - gain * adapted for gain in gains]
        return EvalScores(losses, [1.0] * n, [0] * n, [1] * n, [False] * n)

    monkeypatch.setattr(module, "score", given)
    record = compare(model, examples(n), [], NOTHING, n)
    assert record["better"] is better
    assert record["improvement"] == pytest.approx(sum(gains) / n)
    assert (record["noise"] is None) is (n == 1)


def test_noise_is_the_standard_error_that_resampling_shows() -> None:
    """Of examples with different numbers of targets."""
    rng = torch.Generator().manual_seed(0)
    weights = torch.randint(1, 20, (60,), generator=rng).double()
    gains = weights * 0.3 + torch.randn(60, generator=rng).double() * weights.sqrt()
    zeros = [0] * 60
    base = EvalScores(gains.tolist(), weights.tolist(), zeros, zeros, [False] * 60)
    adapter = EvalScores([0.0] * 60, weights.tolist(), zeros, zeros, [False] * 60)
    mean, noise = module._improvement(base, adapter)
    draws = torch.randint(60, (4000, 60), generator=rng)
    resampled = gains[draws].sum(1) / weights[draws].sum(1)
    assert mean == pytest.approx(float(gains.sum() / weights.sum()))
    assert noise == pytest.approx(float(resampled.std()), rel=0.1)


def test_answers_that_seldom_come_again_are_no_labels(model: AdapterModel) -> None:
    once = classified(2, {"one": [20, 0], "two": [30, 0]})
    assert compare(model, once, [], NOTHING, 2)["labels"] == []
    many = {str(i): [20 + i, 0] for i in range(module.MAX_LABELS + 1)}
    assert compare(model, classified(4, many), classified(60, many), NOTHING, 4)["labels"] == []
    same = classified(4, {"always": [20, 0]})
    record = compare(model, same, same, NOTHING, 4)
    assert record["labels"] == []
    assert record["base"]["exact_match"] == 0.0


def test_a_hopeless_loss_is_still_json(model: AdapterModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        module, "score", lambda *_, **__: EvalScores([1e6, 1e6], [1.0, 1.0], [0, 0], [1, 1], [False, False])
    )
    json.dumps(compare(model, examples(2), [], NOTHING, 2), allow_nan=False)
