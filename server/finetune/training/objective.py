"""The objectives of training: what examples one takes, the loss of a batch, and what its evaluation reports.

run.py and trainer.py call the objective that the recipe names, and compute no loss themselves. Of a further
one, such as DPO, this is to be written:

    finetune/recipe.py       its name in ObjectiveName; its settings (DPO's beta) as fields of Recipe, which
                             `_collect` and `parse_recipe` must take and `recipe_object` shows
    data/record_kinds.py     a kind of record, if the known ones do not fit: its fields and their checks
    data/examples.py         what such a record is in tokens: a subclass of Example, with the `tokens` and
                             `weights` of all its sequences, by which data/ counts, splits and groups
    data/examples.py         also `truncated`, which makes a plain Example of a longer one
    modeling/batch_loss.py   if its loss is not a sum over tokens: only `loss_sum` has a gradient there. The
                             base alone is `model(batch, adapted=False)`, to be run before the adapted pass
    training/                a file with a class as Supervised below, and its line of OBJECTIVES here
    cli/                     training_options.py, so that `polypeft tune` can name it

Checkpoints, jobs and workers know no objective. `compare` fills what cli/job_summary.py prints. That a file
holds the records of its job's objective is to be checked in data/dataset.py, which reads it before a job is
queued (api/fine_tuning/dataset_check.py) and again in training; with one objective there is no such check.
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

    def batch(self, examples: Sequence[Example]) -> Batch:
        """The examples as one forward pass takes them; an example may be several sequences."""
        ...

    def weight(self, batch: Batch) -> float:
        """How much the batch counts in an update, whose losses are divided by the sum over its batches."""
        ...

    def loss(self, model: AdapterModel, batch: Batch) -> BatchOutput:
        """The summed loss of a batch, with gradients for the model's parameters."""
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

    def batch(self, examples: Sequence[Example]) -> Batch:
        return Batch.of(examples)

    def weight(self, batch: Batch) -> float:
        """The total weight of the targets."""
        return float(batch.weights.sum())

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
