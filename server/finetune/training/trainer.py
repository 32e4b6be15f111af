"""transformers.Trainer over an adapter: our batches, our checkpoints, and a watcher that steers.

Stopped after any step and gone on from its checkpoint, a training gives bit for bit what it would have given
undisturbed: order, dropout, optimizer, schedule and evaluations all follow from the seed and the step.

A checkpoint is a folder that holds nothing of the base:

    adapter.safetensors      the tensors after this step, by public name
    best.safetensors         those of the best evaluation, if that was earlier
    trainer_state.json       the history: every step and evaluation so far
    optimizer.pt scheduler.pt rng_state.pth    transformers' own, which it reads back with weights_only
"""

import json
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from server.errors import NonFinite
from server.finetune.data.batching import EvaluationPlan, LengthGroupedBatches, plan_evaluation
from server.finetune.data.examples import Example
from server.finetune.modeling.adapter_model import AdapterModel
from server.finetune.modeling.batch_loss import Batch, BatchOutput
from server.finetune.recipe import Recipe
from server.finetune.training.evaluation import score
from server.finetune.training.observer import StepDone, Stopped, TrainingLog, TrainingObserver

ADAPTER_FILE, BEST_FILE, STATE_FILE = "adapter.safetensors", "best.safetensors", "trainer_state.json"
CHECKPOINT_SECONDS = 60.0  # between two, where no evaluation brings one
FINAL_PASSES = 3  # over the held-out examples, once training is over: what is left of max_seconds is for them
Inputs = dict[str, Batch]  # {"batch": ...}: transformers takes nothing but a mapping
SCHEDULERS = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}


class AdapterTrainer(Trainer):  # type: ignore[misc]  # transformers has no types
    def __init__(
        self,
        model: AdapterModel,
        recipe: Recipe,
        examples: Sequence[Example],
        held_out: Sequence[Example],
        folder: Path,
        watcher: TrainingObserver,
    ) -> None:
        """`folder` gets the checkpoints: checkpoint-STEP, of which the newest two are kept."""
        self.total = recipe.steps(len(examples))
        arguments = training_arguments(recipe, folder, model.device)
        super().__init__(model, arguments, train_dataset=list(examples), callbacks=[_Steering(self)])
        self.remove_callback(PrinterCallback)
        self.model_accepts_loss_kwargs = True  # our losses are means over all accumulated batches already
        self.recipe = recipe
        self.watcher = watcher
        self.plan: EvaluationPlan = plan_evaluation(recipe, examples, held_out)
        self.batches = LengthGroupedBatches([len(e.tokens) for e in examples], recipe.batch_size, recipe.seed)
        self.history = TrainingLog()
        self.best: dict[str, torch.Tensor] | None = None  # None: the tensors as they are
        self.outputs: list[BatchOutput] = []  # of the step under way
        self.tokens = 0
        self.began = self.saved = time.monotonic()
        self.seconds_a_token = 0.0  # of evaluation
        self.stopped: Stopped | None = None

    def fit(self, resume: Path | None = None) -> TrainingLog:
        """Train, and leave the best adapter in the model. Raises Stopped, or NonFinite when it diverges."""
        if resume:
            state = json.loads((resume / STATE_FILE).read_text(encoding="utf-8"))
            self.history = TrainingLog.read(state["log_history"])
            self.tokens = self.history.tokens
            self.began -= self.history.seconds
        if resume and (self.history.step >= self.total or self.stale or self.late):
            self._load_from_checkpoint(str(resume))
        else:
            self.train(resume_from_checkpoint=str(resume) if resume else None)
        if self.stopped:
            raise self.stopped
        if self.best is not None:
            self.model.load(self.best)
        return self.history

    @property
    def stale(self) -> bool:
        """Whether so many evaluations were no better that the recipe says to stop."""
        return 0 < self.recipe.early_stopping <= self.history.evaluations_since_best

    @property
    def late(self) -> bool:
        """Whether one more step might leave too little of max_seconds."""
        ahead = FINAL_PASSES * self.seconds_a_token * sum(len(e.tokens) for e in self.plan.final)
        step = self.history.seconds / max(1, self.history.step)
        return time.monotonic() - self.began + step + ahead > self.recipe.max_seconds

    # what transformers calls

    def get_train_dataloader(self) -> DataLoader[Example]:
        return DataLoader(self.train_dataset, batch_sampler=self.batches, collate_fn=_collate)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Inputs], num_batches: int, device: torch.device
    ) -> tuple[list[Inputs], float]:
        """One update's batches, and the weight of all their targets: what their losses are divided by."""
        inputs, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        return inputs, sum(float(own["batch"].weights.sum()) for own in inputs)

    def compute_loss(
        self,
        model: AdapterModel,
        inputs: Inputs,
        return_outputs: bool = False,
        num_items_in_batch: float | None = None,
    ) -> Any:
        assert num_items_in_batch is not None, "get_batch_samples gives it"
        output: BatchOutput = model(inputs["batch"])
        loss = output.loss_sum / num_items_in_batch
        self._finite(float(loss.detach()), "loss")
        self.outputs.append(output)
        self.tokens += sum(inputs["batch"].lengths)
        return (loss, output) if return_outputs else loss

    def get_decay_parameter_names(self, model: AdapterModel) -> list[str]:
        """Matrices alone decay: a bias or a scale has no reason to be near zero."""
        return [name for name, p in model.named_parameters() if p.ndim > 1]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:  # noqa: ARG002 - theirs
        """After every update, and once at the end, when the watcher has heard everything."""
        if "loss" not in logs:
            return
        self._finite(logs["grad_norm"], "gradient")
        done = StepDone(
            step=self.state.global_step,
            total=self.total,
            loss=logs["loss"],
            accuracy=sum(o.correct for o in self.outputs) / max(1, sum(o.count for o in self.outputs)),
            grad_norm=logs["grad_norm"],
            learning_rate=logs["learning_rate"],
            tokens=self.tokens,
            seconds=time.monotonic() - self.began,
        )
        self.outputs = []
        self.history.steps.append(done)
        self.state.log_history.append(msgspec.to_builtins(done))
        self._steer(done)

    def evaluate(self, *_args: Any, **_kwargs: Any) -> dict[str, float]:
        self.control.should_evaluate, self.control.should_save = False, True
        began = time.monotonic()
        scores = score(self.model, self.plan.examples)
        self.seconds_a_token = (time.monotonic() - began) / sum(len(e.tokens) for e in self.plan.examples)
        done = self.history.evaluate(self.state.global_step, scores.loss, scores.accuracy)
        metrics = {"eval_loss": done.loss, "eval_accuracy": done.accuracy}
        self.state.log_history.append({"step": done.step} | metrics)
        if done.best:
            self.best = self.model.state()
        self.watcher.on_evaluation(done)
        if self.stale and done.step < self.total:
            self._end_early(f"{self.history.evaluations_since_best} evaluations in a row were no better")
        return metrics

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:  # noqa: ARG002 - theirs
        assert output_dir is not None, "checkpoints are all we save"
        folder = Path(output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        save_file(self.model.state(), folder / ADAPTER_FILE)
        best = self.history.best
        if self.best is not None and best and best.step < self.state.global_step:
            save_file(self.best, folder / BEST_FILE)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:  # noqa: ARG002
        folder = Path(resume_from_checkpoint)
        self.model.load(load_file(folder / ADAPTER_FILE))
        if self.history.best:
            best = folder / BEST_FILE
            self.best = load_file(best) if best.exists() else self.model.state()

    # ours

    def _finite(self, value: float, what: str) -> None:
        if not math.isfinite(value):
            rate = self.lr_scheduler.get_last_lr()[0]
            raise NonFinite(
                f"The {what} became {value} in step {self.history.step + 1} of {self.total}, at a learning "
                f"rate of {rate:.3g}; a lower learning_rate may help.",
                param="learning_rate",
                code="non_finite_loss",
            )

    def _steer(self, done: StepDone) -> None:
        """Ask the watcher, and see to time and checkpoints."""
        signal = self.watcher.on_step(done)
        last = done.step == self.total
        if signal != "go":
            self.stopped = Stopped(signal)
            self.control.should_training_stop = True
            self.control.should_save = signal == "pause"
            self.control.should_evaluate &= signal == "pause"  # what is due here is not made up for later
        elif self.late and not last:
            self._end_early(f"max_seconds ({self.recipe.max_seconds}) are used up")
            self.control.should_evaluate, self.control.should_save = bool(self.plan.examples), True
        elif last or time.monotonic() - self.saved > CHECKPOINT_SECONDS:
            self.control.should_save = True

    def _end_early(self, why: str) -> None:
        self.control.should_training_stop = True
        best = self.history.best
        kept = f" The adapter of step {best.step} is kept." if best else ""
        self.watcher.on_event(
            "info", f"Training stopped early, after step {self.history.step} of {self.total}: {why}.{kept}"
        )

    def checkpoint_metrics(self) -> dict[str, float]:
        """Of the step that was last, under OpenAI's names."""
        step, metrics = self.history.steps[-1], {}
        if (done := self.history.evaluations[-1:]) and done[0].step == step.step:
            metrics = {"valid_loss": done[0].loss, "valid_mean_token_accuracy": done[0].accuracy}
        return {
            "step": step.step,
            "train_loss": step.loss,
            "train_mean_token_accuracy": step.accuracy,
        } | metrics


class _Steering(TrainerCallback):  # type: ignore[misc]
    """Where transformers asks what is next."""

    def __init__(self, trainer: AdapterTrainer) -> None:
        self.trainer = trainer

    def on_epoch_begin(self, _args: Any, state: Any, _control: Any, **_kwargs: Any) -> None:
        trainer = self.trainer
        trainer.batches.epoch = state.global_step * trainer.recipe.n_epochs // trainer.total

    def on_step_end(self, _args: Any, state: Any, control: Any, **_kwargs: Any) -> None:
        control.should_evaluate = state.global_step in self.trainer.plan.steps

    def on_save(self, args: Any, state: Any, _control: Any, **_kwargs: Any) -> None:
        trainer = self.trainer
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        trainer.watcher.on_checkpoint(folder, state.global_step, trainer.checkpoint_metrics())
        trainer.saved = time.monotonic()


def _collate(examples: Sequence[Example]) -> Inputs:
    return {"batch": Batch.of(examples)}


def training_arguments(recipe: Recipe, folder: Path, device: torch.device) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=recipe.batch_size,
        gradient_accumulation_steps=recipe.gradient_accumulation,
        num_train_epochs=recipe.n_epochs,
        learning_rate=recipe.learning_rate,
        weight_decay=recipe.weight_decay,
        lr_scheduler_type=SCHEDULERS[recipe.scheduler],
        warmup_steps=recipe.warmup_ratio,
        optim="adamw_torch_fused",
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="no",  # when to save and to evaluate is ours to say
        save_total_limit=2,
        seed=recipe.seed,
        use_cpu=device.type == "cpu",
        disable_tqdm=True,
        report_to="none",
    )
