"""Small trainings for tests: recipes of every method, examples to learn from, an observer that remembers."""

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from server.finetune.data.examples import Example
from server.finetune.jobs.job import ControlSignal, Level
from server.finetune.recipe import Recipe
from server.finetune.recipe_methods import (
    BitfitRecipe,
    BottleneckRecipe,
    LoraRecipe,
    Peft,
    PrefixRecipe,
    PromptRecipe,
)
from server.finetune.training.observer import Evaluated, StepDone

MODULES = ("q_proj", "v_proj", "down_proj")
PEFTS: dict[str, Peft] = {
    "lora": LoraRecipe(r=4, lora_dropout=0.3, target_modules=MODULES),
    "dora": LoraRecipe(r=4, lora_dropout=0.3, target_modules=MODULES, use_dora=True),
    "bottleneck": BottleneckRecipe(placement="double_seq_bn"),
    "prefix": PrefixRecipe(num_virtual_tokens=3),
    "prompt": PromptRecipe(num_virtual_tokens=3),
    "bitfit": BitfitRecipe(),
}


def recipe(method: str = "lora", **fields: Any) -> Recipe:
    defaults: dict[str, Any] = {
        "peft": PEFTS[method],
        "n_epochs": 2,
        "batch_size": 2,
        "learning_rate": 1e-2,
        "early_stopping": 0,
        "max_tokens": 64,
        "max_seconds": 600,
        "seed": 5,
    }
    return Recipe(**defaults | fields)


def examples(count: int, seed: int = 0) -> list[Example]:
    """Of different lengths; each ends as it began, which can be learnt."""
    rng = random.Random(seed)
    made = []
    for _ in range(count):
        context = [rng.randrange(10, 290) for _ in range(rng.randrange(3, 12))]
        answer = context[: rng.randrange(1, 3)]
        made.append(Example(context + answer, [0.0] * len(context) + [1.0] * len(answer), len(context)))
    return made


def write(path: Path, records: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


class Memory:
    """Does what `wish` says of each step, and keeps all it heard."""

    def __init__(self, wish: Callable[[StepDone], ControlSignal] = lambda _: "go") -> None:
        self.wish = wish
        self.steps: list[StepDone] = []
        self.evaluations: list[Evaluated] = []
        self.checkpoints: dict[int, Path] = {}
        self.metrics: list[dict[str, float]] = []
        self.events: list[tuple[Level, str]] = []

    def on_step(self, done: StepDone) -> ControlSignal:
        self.steps.append(done)
        return self.wish(done)

    def on_evaluation(self, evaluated: Evaluated) -> None:
        self.evaluations.append(evaluated)

    def on_checkpoint(self, folder: Path, step: int, metrics: dict[str, float]) -> None:
        self.checkpoints[step] = folder
        self.metrics.append(metrics)

    def on_event(self, level: Level, message: str) -> None:
        self.events.append((level, message))


def until(step: int, wish: ControlSignal) -> Callable[[StepDone], ControlSignal]:
    return lambda done: wish if done.step == step else "go"
