"""Who looks on while a job trains, and steers it. No torch here.

`run_task` calls these from the thread that trains, so whatever they do delays the next step.
"""

from pathlib import Path
from typing import Protocol

import msgspec

from server.finetune.jobs.job import Level, Wish


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


class Watcher(Protocol):
    def on_step(self, done: StepDone) -> Wish:
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

    def __init__(self, wish: Wish) -> None:
        super().__init__(wish)
        self.wish = wish
