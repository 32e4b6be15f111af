"""The objectives of training: what examples one takes, the loss of a batch, and what its evaluation reports.

run.py and trainer.py call the objective that the recipe names. A further one is a file beside this with such
a class, a line of OBJECTIVES, and its name in recipe.ObjectiveName. The kinds of records that a file may hold
are checked before, without torch (data/record_kinds.py).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from server.base_model.tokenizer import Tokenizer
from server.finetune.data import dataset
from server.finetune.data.examples import Example
from server.finetune.modeling.adapter_model import AdapterModel
from server.finetune.modeling.batch_loss import Batch, BatchOutput
from server.finetune.recipe import ObjectiveName
from server.finetune.training import evaluation
from server.finetune.training.evaluation import EvalScores
from server.finetune.training.observer import TrainingLog


class Objective(Protocol):
    """What a training minimises."""

    def load(self, path: Path, tokenizer: Tokenizer, max_tokens: int, param: str) -> list[Example]:
        """The examples of a file, each of at most `max_tokens`. Raises InvalidField, with `param`."""
        ...

    def loss(self, model: AdapterModel, batch: Batch) -> BatchOutput:
        """The loss of a batch, with gradients for the model's parameters."""
        ...

    def score(self, model: AdapterModel, examples: Sequence[Example]) -> EvalScores:
        """The adapted model's scores on held-out examples during training."""
        ...

    def compare(
        self,
        model: AdapterModel,
        held_out: Sequence[Example],
        trained: Sequence[Example],
        log: TrainingLog,
        during_training: int,
    ) -> dict[str, Any]:
        """The job's evaluation record, JSON: base and adapter side by side, and `better`."""
        ...


class Supervised:
    """Predict the targets of each example: cross entropy, by the targets' weights."""

    def load(self, path: Path, tokenizer: Tokenizer, max_tokens: int, param: str) -> list[Example]:
        return dataset.load(path, tokenizer, max_tokens, param=param)

    def loss(self, model: AdapterModel, batch: Batch) -> BatchOutput:
        output: BatchOutput = model(batch)
        return output

    def score(self, model: AdapterModel, examples: Sequence[Example]) -> EvalScores:
        return evaluation.score(model, examples)

    def compare(
        self,
        model: AdapterModel,
        held_out: Sequence[Example],
        trained: Sequence[Example],
        log: TrainingLog,
        during_training: int,
    ) -> dict[str, Any]:
        return evaluation.compare(model, held_out, trained, log, during_training)


OBJECTIVES: dict[ObjectiveName, Objective] = {"supervised": Supervised()}
