"""What a training reports: its callbacks (TrainingObserver) and its log of steps and evaluations. No torch.

The training thread makes the callbacks, so their time delays the next step.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import msgspec

from server.finetune.jobs.job import ControlSignal, Level


class StepDone(msgspec.Struct, frozen=True):
    """One optimizer step. `tokens` (context included) and `seconds` are totals over all attempts so far."""

    step: int  # 1, 2, ...
    total: int
    loss: float
    accuracy: float  # share of the targets that were the model's most likely token
    grad_norm: float  # before clipping
    learning_rate: float
    tokens: int
    seconds: float


class Evaluated(msgspec.Struct, frozen=True):
    """The adapter's scores on held-out examples after `step`."""

    step: int
    loss: float
    accuracy: float
    best: bool  # the lowest loss so far


class TrainingObserver(Protocol):
    """The callbacks of a training."""

    def on_step(self, done: StepDone) -> ControlSignal:
        """Called after each step. Any signal but "go" ends the training with Stopped.

        "pause" saves a checkpoint before.
        """

    def on_evaluation(self, evaluated: Evaluated) -> None: ...

    def on_checkpoint(self, folder: Path, step: int, metrics: dict[str, float]) -> None:
        """`folder` holds what resuming from `step` needs. It is deleted once two newer ones are written.

        `metrics` have OpenAI's names.
        """

    def on_event(self, level: Level, message: str) -> None:
        """A message for the tenant, of one sentence."""


class Stopped(Exception):
    """The observer stopped the training. After "pause" the last checkpoint is where to resume."""

    def __init__(self, signal: ControlSignal) -> None:
        super().__init__(signal)
        self.signal = signal


OVERFIT_RATIO = 1.02  # a held-out loss has risen if it is above this times the best


class TrainingLog(msgspec.Struct):
    """All steps and evaluations of a training, in order, over all attempts."""

    steps: list[StepDone] = []
    evaluations: list[Evaluated] = []

    @classmethod
    def read(cls, log: Sequence[Mapping[str, Any]]) -> "TrainingLog":
        """The log of a trainer_state.json."""
        result = cls()
        for entry in log:
            if "eval_loss" in entry:
                result.add_evaluation(entry["step"], entry["eval_loss"], entry["eval_accuracy"])
            elif "loss" in entry:
                result.steps.append(msgspec.convert(dict(entry), StepDone))
        return result

    def add_evaluation(self, step: int, loss: float, accuracy: float) -> Evaluated:
        best = self.best is None or loss < self.best.loss
        self.evaluations.append(done := Evaluated(step, loss, accuracy, best))
        return done

    @property
    def best(self) -> Evaluated | None:
        return next((e for e in reversed(self.evaluations) if e.best), None)

    @property
    def evaluations_since_best(self) -> int:
        """Number of evaluations since the best one."""
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
        """Whether the held-out loss rose while the training loss went on falling."""
        if self.best is None or self.evaluations[-1].loss <= OVERFIT_RATIO * self.best.loss:
            return False
        points = {point["step"]: point["train_loss"] for point in self.curve()}
        return points[self.evaluations[-1].step] < points[self.best.step]

    def curve(self) -> list[dict[str, float]]:
        """For each evaluation, its loss and the mean training loss since the evaluation before."""
        points, last = [], 0
        for e in self.evaluations:
            losses = [s.loss for s in self.steps if last < s.step <= e.step]
            train = sum(losses) / len(losses) if losses else e.loss
            points.append({"step": e.step, "train_loss": train, "valid_loss": e.loss})
            last = e.step
        return points
