"""transformers.Trainer for an adapter: our batches and checkpoints, and an observer that can stop it.

A training that is stopped after any step and resumed from its checkpoint gives bit for bit the result of an
uninterrupted one: order, dropout, optimizer, schedule and evaluations depend only on the seed and the step.

A checkpoint is a folder that holds nothing of the base:

    adapter.safetensors      the tensors after this step, by public name
    best.safetensors         those of the best evaluation, if that was earlier
    trainer_state.json       the log: every step and evaluation so far
    optimizer.pt scheduler.pt rng_state.pth    transformers' own files, which it reads with weights_only

`_save` writes it; `fit` and `_load_from_checkpoint` read it, also one of an older version: so a new field of
StepDone (observer.py) has a default, and a new file may be absent. The worker stores the folder whatever it
holds (worker/checkpoints.py).
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
from server.finetune.training.objective import OBJECTIVES
from server.finetune.training.observer import StepDone, Stopped, TrainingLog, TrainingObserver

ADAPTER_FILE, BEST_FILE, STATE_FILE = "adapter.safetensors", "best.safetensors", "trainer_state.json"
CHECKPOINT_SECONDS = 60.0  # the longest time between two checkpoints; each evaluation makes one
FINAL_PASSES = 3  # over the held-out examples after training; max_seconds includes their time
Inputs = dict[str, Batch]  # {"batch": ...}: transformers needs a mapping
SCHEDULERS = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}


class AdapterTrainer(Trainer):  # type: ignore[misc]  # transformers has no types
    """Trains an AdapterModel by a recipe; `fit` runs it."""

    def __init__(
        self,
        model: AdapterModel,
        recipe: Recipe,
        examples: Sequence[Example],
        held_out: Sequence[Example],
        folder: Path,
        observer: TrainingObserver,
    ) -> None:
        """`folder` gets the checkpoints: checkpoint-STEP, of which the newest two are kept."""
        self.total = recipe.steps(len(examples))
        arguments = training_arguments(recipe, folder, model.device)
        super().__init__(model, arguments, train_dataset=list(examples), callbacks=[_Callbacks(self)])
        self.remove_callback(PrinterCallback)
        self.model_accepts_loss_kwargs = True  # compute_loss divides by the weight of the whole update
        self.recipe = recipe
        self.objective = OBJECTIVES[recipe.objective]
        self.observer = observer
        self.plan: EvaluationPlan = plan_evaluation(recipe, examples, held_out)
        self.batches = LengthGroupedBatches([len(e.tokens) for e in examples], recipe.batch_size, recipe.seed)
        self.training_log = TrainingLog()
        self.best: dict[str, torch.Tensor] | None = None  # None: the current tensors are the best
        self.outputs: list[BatchOutput] = []  # of the current step
        self.tokens = 0
        self.started_at = self.saved_at = time.monotonic()
        self.seconds_per_token = 0.0  # of evaluation
        self.stopped: Stopped | None = None

    def fit(self, resume: Path | None = None) -> TrainingLog:
        """Train, from a checkpoint folder if there is one; the model ends with the best adapter's tensors.

        Raises Stopped, or NonFinite if the training diverges.
        """
        if resume:
            state = json.loads((resume / STATE_FILE).read_text(encoding="utf-8"))
            self.training_log = TrainingLog.read(state["log_history"])
            self.tokens = self.training_log.tokens
            self.started_at -= self.training_log.seconds
        if resume and (self.training_log.step >= self.total or self.stale or self.late):
            self._load_from_checkpoint(str(resume))
        else:
            self.train(resume_from_checkpoint=str(resume) if resume else None)
        if self.stopped:
            raise self.stopped
        if self.best is not None:
            self.model.load(self.best)
        return self.training_log

    @property
    def stale(self) -> bool:
        """Whether the last `early_stopping` evaluations were no better."""
        return 0 < self.recipe.early_stopping <= self.training_log.evaluations_since_best

    @property
    def late(self) -> bool:
        """Whether one more step might leave too little of max_seconds."""
        final_seconds = FINAL_PASSES * self.seconds_per_token * sum(len(e.tokens) for e in self.plan.final)
        step_seconds = self.training_log.seconds / max(1, self.training_log.step)
        return time.monotonic() - self.started_at + step_seconds + final_seconds > self.recipe.max_seconds

    # called by transformers

    def get_train_dataloader(self) -> DataLoader[Example]:
        return DataLoader(self.train_dataset, batch_sampler=self.batches, collate_fn=self._collate)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Inputs], num_batches: int, device: torch.device
    ) -> tuple[list[Inputs], float]:
        """The batches of one update, and their total weight, by which losses are divided."""
        inputs, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        return inputs, sum(self.objective.weight(item["batch"]) for item in inputs)

    def compute_loss(
        self,
        model: AdapterModel,
        inputs: Inputs,
        return_outputs: bool = False,
        num_items_in_batch: float | None = None,
    ) -> Any:
        """The loss [] of one batch's share in the update. Raises NonFinite."""
        assert num_items_in_batch is not None, "get_batch_samples gives it"
        output = self.objective.loss(model, inputs["batch"])
        loss = output.loss_sum / num_items_in_batch
        self._check_finite(float(loss.detach()), "loss")
        self.outputs.append(output)
        self.tokens += sum(inputs["batch"].lengths)
        return (loss, output) if return_outputs else loss

    def get_decay_parameter_names(self, model: AdapterModel) -> list[str]:
        """Only matrices decay: biases and scales have no reason to be near zero."""
        return [name for name, p in model.named_parameters() if p.ndim > 1]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:  # noqa: ARG002 - their signature
        """Called after each update, and once more at the end without a loss."""
        if "loss" not in logs:
            return
        self._check_finite(logs["grad_norm"], "gradient")
        done = StepDone(
            step=self.state.global_step,
            total=self.total,
            loss=logs["loss"],
            accuracy=sum(o.correct for o in self.outputs) / max(1, sum(o.count for o in self.outputs)),
            grad_norm=logs["grad_norm"],
            learning_rate=logs["learning_rate"],
            tokens=self.tokens,
            seconds=time.monotonic() - self.started_at,
        )
        self.outputs = []
        self.training_log.steps.append(done)
        self.state.log_history.append(msgspec.to_builtins(done))
        self._notify(done)

    def evaluate(self, *_args: Any, **_kwargs: Any) -> dict[str, float]:
        """Score the held-out examples, keep the best tensors, and end early if scores stopped improving."""
        self.control.should_evaluate, self.control.should_save = False, True
        start = time.monotonic()
        scores = self.objective.score(self.model, self.plan.examples)
        self.seconds_per_token = (time.monotonic() - start) / sum(len(e.tokens) for e in self.plan.examples)
        done = self.training_log.add_evaluation(self.state.global_step, scores.loss, scores.accuracy)
        metrics = {"eval_loss": done.loss, "eval_accuracy": done.accuracy}
        self.state.log_history.append({"step": done.step} | metrics)
        if done.best:
            self.best = self.model.state()
        self.observer.on_evaluation(done)
        if self.stale and done.step < self.total:
            self._end_early(f"{self.training_log.evaluations_since_best} evaluations in a row were no better")
        return metrics

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:  # noqa: ARG002 - their signature
        assert output_dir is not None, "we save checkpoints only"
        folder = Path(output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        save_file(self.model.state(), folder / ADAPTER_FILE)
        best = self.training_log.best
        if self.best is not None and best and best.step < self.state.global_step:
            save_file(self.best, folder / BEST_FILE)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:  # noqa: ARG002
        folder = Path(resume_from_checkpoint)
        self.model.load(load_file(folder / ADAPTER_FILE))
        if self.training_log.best:
            best = folder / BEST_FILE
            self.best = load_file(best) if best.exists() else self.model.state()

    # our own methods

    def _collate(self, examples: Sequence[Example]) -> Inputs:
        return {"batch": self.objective.batch(examples)}

    def _check_finite(self, value: float, what: str) -> None:
        if not math.isfinite(value):
            rate = self.lr_scheduler.get_last_lr()[0]
            raise NonFinite(
                f"The {what} became {value} in step {self.training_log.step + 1} of {self.total}, "
                f"at a learning rate of {rate:.3g}; a lower learning_rate may help.",
                param="learning_rate",
                code="non_finite_loss",
            )

    def _notify(self, done: StepDone) -> None:
        """Report the step to the observer, and decide whether to stop, evaluate or save."""
        signal = self.observer.on_step(done)
        last = done.step == self.total
        if signal != "go":
            self.stopped = Stopped(signal)
            self.control.should_training_stop = True
            self.control.should_save = signal == "pause"
            # a resumed training would skip an evaluation that is due now
            self.control.should_evaluate &= signal == "pause"
        elif self.late and not last:
            self._end_early(f"max_seconds ({self.recipe.max_seconds}) are used up")
            self.control.should_evaluate, self.control.should_save = bool(self.plan.examples), True
        elif last or time.monotonic() - self.saved_at > CHECKPOINT_SECONDS:
            self.control.should_save = True

    def _end_early(self, why: str) -> None:
        self.control.should_training_stop = True
        best = self.training_log.best
        kept = f" The adapter of step {best.step} is kept." if best else ""
        self.observer.on_event(
            "info",
            f"Training stopped early, after step {self.training_log.step} of {self.total}: {why}.{kept}",
        )

    def checkpoint_metrics(self) -> dict[str, float]:
        """Metrics of the last step, by OpenAI's names."""
        step, metrics = self.training_log.steps[-1], {}
        if (evaluated := self.training_log.evaluations[-1:]) and evaluated[0].step == step.step:
            metrics = {"valid_loss": evaluated[0].loss, "valid_mean_token_accuracy": evaluated[0].accuracy}
        return {
            "step": step.step,
            "train_loss": step.loss,
            "train_mean_token_accuracy": step.accuracy,
        } | metrics


class _Callbacks(TrainerCallback):  # type: ignore[misc]
    """transformers' callbacks for the schedule of epochs, evaluations and checkpoints."""

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
        trainer.observer.on_checkpoint(folder, state.global_step, trainer.checkpoint_metrics())
        trainer.saved_at = time.monotonic()


def training_arguments(recipe: Recipe, folder: Path, device: torch.device) -> TrainingArguments:
    """transformers' settings for a recipe; checkpoints go to `folder`."""
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
        save_strategy="no",  # we decide when to save and to evaluate
        save_total_limit=2,
        seed=recipe.seed,
        use_cpu=device.type == "cpu",
        disable_tqdm=True,
        report_to="none",
    )
