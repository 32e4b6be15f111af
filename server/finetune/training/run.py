"""One training from files to files, in this process: no Valkey, no network. Same files, same result."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import torch

from server.base_model.tokenizer import Tokenizer
from server.errors import InvalidField
from server.finetune.data.dataset import load, split
from server.finetune.data.examples import Example
from server.finetune.modeling.adapter_model import AdapterModel
from server.finetune.recipe import Recipe
from server.finetune.recipe_methods import PrefixRecipe, PromptRecipe
from server.finetune.training.evaluation import compare
from server.finetune.training.observer import TrainingObserver
from server.finetune.training.reports import draw_losses, write_metrics
from server.finetune.training.trainer import AdapterTrainer


class TrainingOutput(msgspec.Struct, frozen=True):
    """What a finished training leaves in its work folder."""

    adapter: Path  # a folder with the config and the safetensors file, as an upload would bring them
    metrics: Path  # CSV
    plot: Path  # PNG
    evaluation: dict[str, Any] | None  # evaluate.compare's record; None if nothing was held out
    better: bool | None
    trained_tokens: int
    steps: int


def run_training(
    recipe: Recipe,
    base: Path,
    training: Path,
    validation: Path | None,
    work: Path,
    watcher: TrainingObserver,
    resume_from: Path | None = None,
    *,
    base_id: str,
    device: torch.device | None = None,
    threads: int | None = None,
) -> TrainingOutput:
    """Train what `recipe` says on JSONL files that were checked before; all that is written lies in `work`.

    `resume_from` is a folder that the watcher got from `on_checkpoint`. `threads` of torch's: None leaves
    them as they are; more than there are cores makes everybody slow (kernels/openmp.py). Raises Stopped when
    the watcher wishes it, NonFinite when training diverges, InvalidField and InvalidAdapter.
    """
    if threads:
        torch.set_num_threads(threads)
    tokenizer = Tokenizer.load(base)
    examples, held_out = _examples(recipe, training, validation, tokenizer)
    model = AdapterModel(
        base, base_id, recipe, init_text=_init_text(recipe, examples, tokenizer), device=device
    )
    trainer = AdapterTrainer(model, recipe, examples, held_out, work / "checkpoints", watcher)
    history = trainer.fit(resume_from)
    record = None
    if final := trainer.plan.final:
        record = compare(model, final, examples, history, len(trainer.plan.examples))
    result = TrainingOutput(
        adapter=work / "adapter",
        metrics=work / "metrics.csv",
        plot=work / "losses.png",
        evaluation=record,
        better=record["better"] if record else None,
        trained_tokens=history.tokens,
        steps=history.step,
    )
    model.save(result.adapter)
    write_metrics(history, result.metrics)
    draw_losses(history, result.plot, base_loss=record["base_loss"] if record else None)
    return result


def _examples(
    recipe: Recipe, training: Path, validation: Path | None, tokenizer: Tokenizer
) -> tuple[list[Example], list[Example]]:
    """To train on, and held out."""
    examples = load(training, tokenizer, recipe.max_tokens)
    if validation:
        held_out = load(validation, tokenizer, recipe.max_tokens, param="validation_file")
    else:
        examples, held_out = split(examples, recipe.eval_share, recipe.seed)
    if not examples:
        raise InvalidField("training_file has no example to train on.", param="training_file")
    return examples, held_out


def _init_text(recipe: Recipe, examples: Sequence[Example], tokenizer: Tokenizer) -> list[int]:
    """What virtual tokens start as: the recipe's own text, or what the training data begin with."""
    if not isinstance(recipe.peft, PrefixRecipe | PromptRecipe):
        return []
    if recipe.peft.init_text:
        return tokenizer.encode(recipe.peft.init_text, special=False)
    tokens: list[int] = []
    for example in examples:
        tokens += example.tokens
        if len(tokens) >= recipe.num_virtual_tokens:
            break
    return tokens
