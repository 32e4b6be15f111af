"""What a training has gone through: its steps and its evaluations, oldest first. No torch here."""

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from server.finetune.training.observer import Evaluated, StepDone

RISE = 1.02  # of a loss on held-out examples; less is no rise


class History(msgspec.Struct):
    steps: list[StepDone] = []
    evaluations: list[Evaluated] = []

    @classmethod
    def read(cls, log: Sequence[Mapping[str, Any]]) -> "History":
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
    def worse(self) -> int:
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
        if self.best is None or self.evaluations[-1].loss <= RISE * self.best.loss:
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
