"""The table of objectives, and that training takes from it what it minimises and what it evaluates."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import get_args

import msgspec
import pytest

from server.finetune.data.examples import Example
from server.finetune.modeling.adapter_model import AdapterModel
from server.finetune.modeling.batch_loss import Batch, BatchOutput
from server.finetune.recipe import ObjectiveName, Recipe
from server.finetune.training.evaluation import EvalScores
from server.finetune.training.objective import OBJECTIVES, Supervised
from server.finetune.training.trainer import AdapterTrainer
from tests.server.finetune.small_trainings import Memory, examples, recipe


class Threefold(Supervised):
    """Every loss three times as high, in training and in evaluation."""

    def loss(self, model: AdapterModel, batch: Batch) -> BatchOutput:
        output = super().loss(model, batch)
        return dataclasses.replace(output, loss_sum=3 * output.loss_sum)

    def score(self, model: AdapterModel, examples: Sequence[Example]) -> EvalScores:
        scores = super().score(model, examples)
        return msgspec.structs.replace(scores, losses=[3 * loss for loss in scores.losses])


class Paired(Supervised):
    """Every example as two sequences, which count for one."""

    def batch(self, examples: Sequence[Example]) -> Batch:
        return super().batch([example for example in examples for _ in range(2)])

    def weight(self, batch: Batch) -> float:
        return super().weight(batch) / 2


def test_every_name_has_an_objective() -> None:
    assert set(OBJECTIVES) == set(get_args(ObjectiveName))


def test_a_recipe_of_an_older_version_is_supervised() -> None:
    stored = msgspec.to_builtins(recipe())
    del stored["objective"]
    assert msgspec.convert(stored, Recipe) == recipe()


def test_training_minimises_and_evaluates_what_the_objective_says(
    tiny_models: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logs = []
    for objective in (Supervised(), Threefold()):
        monkeypatch.setitem(OBJECTIVES, "supervised", objective)
        model = AdapterModel(tiny_models("llama"), "tiny", own := recipe(n_epochs=1, learning_rate=1e-9))
        folder = tmp_path / type(objective).__name__
        logs.append(AdapterTrainer(model, own, examples(8), examples(4, seed=1), folder, Memory()).fit())
    plain, threefold = logs
    assert threefold.steps[0].loss == pytest.approx(3 * plain.steps[0].loss, rel=1e-3)
    assert threefold.evaluations[-1].loss == pytest.approx(3 * plain.evaluations[-1].loss, rel=1e-3)


def test_an_objective_makes_its_batches_and_weighs_them(
    tiny_models: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = []
    for objective in (Supervised(), Paired()):
        monkeypatch.setitem(OBJECTIVES, "supervised", objective)
        model = AdapterModel(tiny_models("llama"), "tiny", own := recipe(n_epochs=1, learning_rate=1e-9))
        folder = tmp_path / type(objective).__name__
        log = AdapterTrainer(model, own, examples(8), examples(4, seed=1), folder, Memory()).fit()
        steps.append(log.steps[0])
    plain, paired = steps
    assert paired.tokens == 2 * plain.tokens
    assert paired.loss == pytest.approx(2 * plain.loss, rel=1e-3)
