"""Who looks on while a job trains, and steers it. No torch here.

`run_task` calls these from the thread that trains, so whatever they do delays the next step.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import msgspec

from server.finetune.jobs.job import ControlSignal, Level


class StepDone(msgspec.Struct, frozen=True):
    """One update. `tokens` counts all tokens trained on so far, context included; `seconds` the time so far,
    both over all attempts.
    """

    step: int  # 1, 2, ...
    total: int
    loss: float
    accuracy: float  # of the targets, the share that was the model's first choice
    grad_norm: float  # before clipping
    learning_rate: float
    tokens: int
    seconds: float


class Evaluated(msgspec.Struct, frozen=True):
    """How the adapter does on held-out examples after `step`."""

    step: int
    loss: float
    accuracy: float
    best: bool  # the lowest loss so far


class TrainingObserver(Protocol):
    def on_step(self, done: StepDone) -> ControlSignal:
        """What to do next. "pause" leaves a checkpoint, the others do not; then Stopped is raised."""

    def on_evaluation(self, evaluated: Evaluated) -> None: ...

    def on_checkpoint(self, folder: Path, step: int, metrics: dict[str, float]) -> None:
        """`folder` holds all that going on from `step` takes; it is removed once two newer ones are written.

        `metrics` have OpenAI's names.
        """

    def on_event(self, level: Level, message: str) -> None:
        """Something the tenant should know, in one sentence."""


class Stopped(Exception):
    """The watcher wished it. After "pause" its last checkpoint is where to go on."""

    def __init__(self, signal: ControlSignal) -> None:
        super().__init__(signal)
        self.signal = signal


OVERFIT_RATIO = 1.02  # of a loss on held-out examples; less is no rise


class TrainingLog(msgspec.Struct):
    steps: list[StepDone] = []
    evaluations: list[Evaluated] = []

    @classmethod
    def read(cls, log: Sequence[Mapping[str, Any]]) -> "TrainingLog":
        """From what the trainer logged."""
        history = cls()
        for entry in log:
            if "eval_loss" in entry:
                history.evaluate(entry["step"], entry["eval_loss"], entry["eval_accuracy"])
            elif "loss" in entry:
                history.steps.append(msgspec.convert(dict(entry), StepDone))
        return history

    def evaluate(self, step: int, loss: float, accuracy: float) -> Evaluated:
        best = self.best is None or loss < self.best.loss
        self.evaluations.append(done := Evaluated(step, loss, accuracy, best))
        return done

    @property
    def best(self) -> Evaluated | None:
        return next((e for e in reversed(self.evaluations) if e.best), None)

    @property
    def evaluations_since_best(self) -> int:
        """Evaluations since the best one."""
        return next((i for i, e in enumerate(reversed(self.evaluations)) if e.best), 0)

    @property
    def step(self) -> int:
        return self.steps[-1].step if self.steps else 0

    @property
    def tokens(self) -> int:
        return self.steps[-1].tokens if self.steps else 0

    @property
    def seconds(self) -> float:
        return self.steps[-1].seconds if self.steps else 0.0

    @property
    def overfitted(self) -> bool:
        """Whether the loss on held-out examples rose while that on the training data went on falling."""
        if self.best is None or self.evaluations[-1].loss <= OVERFIT_RATIO * self.best.loss:
            return False
        points = {point["step"]: point["train_loss"] for point in self.curve()}
        return points[self.evaluations[-1].step] < points[self.best.step]

    def curve(self) -> list[dict[str, float]]:
        """Of each evaluation, its loss beside the mean loss of the steps since the one before."""
        points, after = [], 0
        for e in self.evaluations:
            losses = [s.loss for s in self.steps if after < s.step <= e.step]
            train = sum(losses) / len(losses) if losses else e.loss
            points.append({"step": e.step, "train_loss": train, "valid_loss": e.loss})
            after = e.step
        return points
