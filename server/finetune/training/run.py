"""One training, from data files to an adapter and its reports. No Valkey, no network; reproducible."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import torch

from server.base_model.tokenizer import Tokenizer
from server.errors import InvalidField
from server.finetune.data.dataset import split
from server.finetune.data.examples import Example
from server.finetune.modeling.adapter_model import AdapterModel
from server.finetune.recipe import Recipe
from server.finetune.recipe_methods import PrefixRecipe, PromptRecipe
from server.finetune.training.objective import OBJECTIVES
from server.finetune.training.observer import TrainingObserver
from server.finetune.training.reports import draw_losses, write_metrics
from server.finetune.training.trainer import AdapterTrainer


class TrainingOutput(msgspec.Struct, frozen=True):
    """What a finished training has written to its work folder."""

    adapter: Path  # a folder with the config and the safetensors file, as in an upload
    metrics: Path  # CSV
    plot: Path  # PNG
    evaluation: dict[str, Any] | None  # of the objective's compare; None if nothing was held out
    better: bool | None
    trained_tokens: int
    steps: int


def run_training(
    recipe: Recipe,
    base: Path,
    training: Path,
    validation: Path | None,
    work: Path,
    observer: TrainingObserver,
    resume_from: Path | None = None,
    *,
    base_id: str,
    device: torch.device | None = None,
    threads: int | None = None,
    tool_format: str = "auto",
) -> TrainingOutput:
    """Train by `recipe` on JSONL files that were checked before; all output goes to the folder `work`.

    `resume_from` is a folder that the observer got from `on_checkpoint`. `threads` is torch's number of
    threads; None leaves it. More threads than cores slow down all processes (kernels/cpu/openmp.py). Raises
    Stopped when the observer stops the training, NonFinite when it diverges, InvalidField and InvalidAdapter.
    """
    if threads:
        torch.set_num_threads(threads)
    tokenizer = Tokenizer.load(base, tool_format)
    examples, held_out = _examples(recipe, training, validation, tokenizer)
    model = AdapterModel(
        base, base_id, recipe, init_text=_init_text(recipe, examples, tokenizer), device=device
    )
    trainer = AdapterTrainer(model, recipe, examples, held_out, work / "checkpoints", observer)
    log = trainer.fit(resume_from)
    evaluation = None
    if final := trainer.plan.final:
        evaluation = trainer.objective.compare(model, final, examples, log, len(trainer.plan.examples))
    result = TrainingOutput(
        adapter=work / "adapter",
        metrics=work / "metrics.csv",
        plot=work / "losses.png",
        evaluation=evaluation,
        better=evaluation["better"] if evaluation else None,
        trained_tokens=log.tokens,
        steps=log.step,
    )
    model.save(result.adapter)
    write_metrics(log, result.metrics)
    draw_losses(log, result.plot, base_loss=evaluation["base_loss"] if evaluation else None)
    return result


def _examples(
    recipe: Recipe, training: Path, validation: Path | None, tokenizer: Tokenizer
) -> tuple[list[Example], list[Example]]:
    """(training examples, held-out examples). Raises InvalidField if none is left to train on."""
    objective = OBJECTIVES[recipe.objective]
    examples = objective.load(training, tokenizer, recipe.max_tokens, "training_file")
    if validation:
        held_out = objective.load(validation, tokenizer, recipe.max_tokens, "validation_file")
    else:
        examples, held_out = split(examples, recipe.eval_share, recipe.seed)
    if not examples:
        raise InvalidField("training_file has no example to train on.", param="training_file")
    return examples, held_out


def _init_text(recipe: Recipe, examples: Sequence[Example], tokenizer: Tokenizer) -> list[int]:
    """The tokens that initialise virtual tokens: the recipe's text, or the start of the training data."""
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
