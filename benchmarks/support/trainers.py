"""Ours and PEFT's training of the same adapter, each in a child process that trains in turns.

Both start from the same tensors and see the same batches in the same order, through transformers.Trainer
with the same arguments. PEFT's side pads each batch to its longest example, and has SDPA and the fused AdamW.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader
from transformers import PrinterCallback, Trainer, TrainerCallback

from benchmarks.support.arms import Child, quiet
from server.finetune.data.batching import LengthGroupedBatches
from server.finetune.data.examples import Example
from server.finetune.jobs.job import ControlSignal, Level
from server.finetune.modeling.adapter_model import AdapterModel
from server.finetune.recipe import Recipe
from server.finetune.training.evaluation import score
from server.finetune.training.observer import Evaluated, StepDone
from server.finetune.training.trainer import AdapterTrainer, training_arguments

NO_TARGET = -100
EVALUATED_AT_ONCE = 4


@dataclass(frozen=True)
class Job:
    """What both train. `start` is an adapter's folder, as `Trainable.save` writes it."""

    model: Path
    recipe: Recipe
    examples: list[Example]
    held_out: list[Example]
    start: Path
    scratch: Path
    threads: int
    steps_a_turn: int


@dataclass(frozen=True)
class Turn:
    """Some steps in a row. `held_out` comes with the last one, which is over when training is."""

    seconds: float
    losses: list[float]
    held_out: float | None = None


class Turns:
    """The child's side: told of each step, it reports a turn when it is full and waits for the next."""

    def __init__(self, connection: Connection, size: int) -> None:
        self.connection = connection
        self.size = size
        self.losses: list[float] = []

    def begin(self) -> None:
        self.connection.recv()
        self.losses = []
        self.began = time.perf_counter()

    def step(self, loss: float, *, last: bool) -> None:
        self.losses.append(loss)
        if last or len(self.losses) == self.size:
            self.done = Turn(time.perf_counter() - self.began, self.losses)
            if not last:
                self.connection.send(self.done)
                self.begin()

    def end(self, held_out: float) -> None:
        self.connection.send(Turn(self.done.seconds, self.done.losses, held_out))


class Told(Protocol):
    """Who hears of each step."""

    def step(self, loss: float, *, last: bool) -> None: ...


class Silent:
    """Of a training that nobody compares."""

    def step(self, loss: float, *, last: bool) -> None:
        """Goes on."""


class Side(Protocol):
    """A training that is ready to begin."""

    def __init__(self, job: Job, turns: Turns) -> None: ...

    def train(self) -> None: ...

    def held_out(self) -> float: ...


class Ours:
    def __init__(self, job: Job, turns: Told) -> None:
        self.job = job
        self.turns = turns
        self.model = ours(job)
        folder = job.scratch / "ours"
        self.trainer = AdapterTrainer(self.model, job.recipe, job.examples, [], folder, self)

    def train(self) -> None:
        self.trainer.fit()

    def held_out(self) -> float:
        return score(self.model, self.job.held_out).loss

    def on_step(self, done: StepDone) -> ControlSignal:
        self.turns.step(done.loss, last=done.step == done.total)
        return "go"

    def on_evaluation(self, evaluated: Evaluated) -> None:
        """There is none before the end."""

    def on_checkpoint(self, folder: Path, step: int, metrics: dict[str, float]) -> None:
        """Where it lies does for a benchmark."""

    def on_event(self, level: Level, message: str) -> None:
        """Nothing but an early end, which a recipe for a benchmark does not ask for."""


def ours(job: Job) -> AdapterModel:
    return AdapterModel(job.model, job.model.name, job.recipe, init_text=job.examples[0].tokens)


def train_ours(job: Job) -> AdapterModel:
    """Trained to the end, in this process."""
    side = Ours(job, Silent())
    side.train()
    return side.model


class Theirs:
    """PEFT's model in transformers' Trainer, as its documentation has it."""

    def __init__(self, job: Job, turns: Turns) -> None:
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        self.job = job
        base = AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.float32, local_files_only=True)
        virtual = job.recipe.num_virtual_tokens > 0
        self.model: Any = PeftModel.from_pretrained(base, job.start, is_trainable=not virtual)
        if virtual:  # PEFT loads those for inference only, but trains them all the same
            self.model.prompt_encoder.requires_grad_(True)
        self.trainer = _Trainer(self.model, job, turns)

    def train(self) -> None:
        self.trainer.train()

    @torch.no_grad()
    def held_out(self) -> float:
        self.model.eval()
        total, targets = 0.0, 0
        for at in range(0, len(self.job.held_out), EVALUATED_AT_ONCE):
            inputs = padded(self.job.held_out[at : at + EVALUATED_AT_ONCE])
            count = int((inputs["labels"] != NO_TARGET).sum())
            total += float(self.model(**inputs).loss) * count
            targets += count
        return total / targets


class _Trainer(Trainer):  # type: ignore[misc]  # transformers has no types
    def __init__(self, model: Any, job: Job, turns: Turns) -> None:
        arguments = training_arguments(job.recipe, job.scratch / "theirs", torch.device("cpu"))
        super().__init__(model, arguments, train_dataset=job.examples, callbacks=[_Told(turns)])
        self.remove_callback(PrinterCallback)
        self.batches = LengthGroupedBatches(
            [len(e.tokens) for e in job.examples], job.recipe.batch_size, job.recipe.seed
        )

    def get_train_dataloader(self) -> DataLoader[Example]:
        return DataLoader(self.train_dataset, batch_sampler=self.batches, collate_fn=padded)


class _Told(TrainerCallback):  # type: ignore[misc]
    def __init__(self, turns: Turns) -> None:
        self.turns = turns

    def on_epoch_begin(self, _args: Any, state: Any, _control: Any, **kwargs: Any) -> None:
        kwargs["train_dataloader"].batch_sampler.epoch = round(state.epoch or 0)

    def on_log(self, _args: Any, state: Any, _control: Any, logs: dict[str, float], **_kwargs: Any) -> None:
        if "loss" in logs:
            self.turns.step(logs["loss"], last=state.global_step == state.max_steps)


def padded(examples: Sequence[Example]) -> dict[str, torch.Tensor]:
    width = max(len(e.tokens) for e in examples)
    gaps = [width - len(e.tokens) for e in examples]
    labels = [[t if w else NO_TARGET for t, w in zip(e.tokens, e.weights, strict=True)] for e in examples]
    pairs = list(zip(examples, labels, gaps, strict=True))
    return {
        "input_ids": torch.tensor([e.tokens + [0] * gap for e, _, gap in pairs]),
        "attention_mask": torch.tensor([[1] * len(e.tokens) + [0] * gap for e, _, gap in pairs]),
        "labels": torch.tensor([own + [NO_TARGET] * gap for _, own, gap in pairs]),
    }


SIDES: dict[str, Callable[[Job, Turns], Side]] = {"polypeft": Ours, "peft": Theirs}


class Remote(Child):
    """A side in a child process."""

    def __init__(self, name: str, job: Job) -> None:
        super().__init__(_serve, name, job)

    def turn(self) -> Turn:
        """Raises EOFError when the child died; its own traceback is on stderr."""
        self.connection.send("go")
        turn: Turn = self.connection.recv()
        return turn


def _serve(name: str, job: Job, connection: Connection) -> None:
    quiet()
    torch.set_num_threads(job.threads)
    turns = Turns(connection, job.steps_a_turn)
    side = SIDES[name](job, turns)
    connection.send("loaded")
    turns.begin()
    side.train()
    turns.end(side.held_out())
