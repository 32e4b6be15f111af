import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from safetensors.torch import load_file

from server.errors import NonFinite
from server.finetune.data.examples import Example
from server.finetune.modeling.adapter_model import AdapterModel
from server.finetune.recipe import Recipe
from server.finetune.training import trainer as module
from server.finetune.training.evaluation import score
from server.finetune.training.observer import StepDone, Stopped, TrainingLog
from server.finetune.training.trainer import AdapterTrainer
from tests.server.finetune.small_trainings import PEFTS, Memory, examples, recipe, until

HELD_OUT = examples(5, seed=1)


@pytest.fixture(scope="module")
def llama(tiny_models: Callable[[str], Path]) -> Path:
    return tiny_models("llama")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small only wait for a second one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Run:
    """A training of 11 examples, unless others are given; all of it lies in `folder`."""

    def __init__(
        self,
        base: Path,
        own: Recipe,
        folder: Path,
        observer: Memory | None = None,
        trained: Sequence[Example] | None = None,
        held_out: Sequence[Example] = HELD_OUT,
    ) -> None:
        self.memory = observer or Memory()
        self.model = AdapterModel(base, "tiny", own)
        data = examples(11) if trained is None else trained
        self.trainer = AdapterTrainer(self.model, own, data, held_out, folder, self.memory)

    def fit(self, resume: Path | None = None) -> "Run":
        self.trainer.fit(resume)
        return self

    def ended(self) -> tuple[dict[str, list[Any]], list[dict[str, Any]], list[dict[str, Any]]]:
        """The tensors, the evaluations, and the steps less how long they took."""
        tensors = {name: tensor.flatten().tolist() for name, tensor in self.model.state().items()}
        history = msgspec.to_builtins(self.trainer.training_log)
        return tensors, history["evaluations"], [s | {"seconds": None} for s in history["steps"]]


@pytest.mark.parametrize("method", PEFTS)
def test_a_training_that_was_stopped_ends_as_if_it_had_not_been(
    llama: Path, tmp_path: Path, method: str
) -> None:
    """LoRA in the middle of an epoch and at its end, with an evaluation and without, after the last step."""
    own = recipe(method, gradient_accumulation=2, n_epochs=3)
    whole = Run(llama, own, tmp_path / "whole").fit()
    assert [s.step for s in whole.memory.steps] == list(range(1, 10))
    for stop in (1, 3, 5, 9) if method == "lora" else (5,):
        memory = Memory(until(stop, "pause"))
        with pytest.raises(Stopped, match="pause"):
            Run(llama, own, tmp_path / f"first-{stop}", memory).fit()
        checkpoint = Path(shutil.move(memory.checkpoints[stop], tmp_path / f"moved-{stop}"))
        torch.manual_seed(stop)
        second = Run(llama, own, tmp_path / f"second-{stop}").fit(checkpoint)
        assert [s.step for s in second.memory.steps] == list(range(stop + 1, 10))
        assert second.ended() == whole.ended()


def test_dropout_differs_from_step_to_step_and_with_the_seed(llama: Path, tmp_path: Path) -> None:
    """Otherwise the test above would not see a random state that was lost."""
    runs = [
        Run(llama, recipe(seed=seed, learning_rate=1e-9, n_epochs=1), tmp_path / str(seed)) for seed in (1, 2)
    ]
    batch = next(iter(runs[0].trainer.get_train_dataloader()))["batch"]
    with torch.no_grad():
        for name, parameter in runs[0].model.params.items():
            parameter.normal_(0, 0.3) if "lora_B" in name else None
        losses = {float(runs[0].model.train()(batch).loss_sum) for _ in range(3)}
    assert len(losses) == 3
    assert runs[0].fit().ended()[0] != runs[1].fit().ended()[0]


def test_accumulated_batches_weigh_as_much_as_their_targets(llama: Path, tmp_path: Path) -> None:
    """Two batches of two give the update of one batch of four, though their targets differ in number."""
    four = [
        Example([5, 6, 7, 8, 9], [0.0, 1.0, 1.0, 1.0, 1.0]),
        Example([8, 9, 4], [0.0, 0.0, 1.0]),
        Example([3, 2, 1, 7, 6], [0.0, 0.0, 0.0, 0.5, 1.0]),
        Example([11, 12], [0.0, 1.0]),
    ]
    ends = []
    for size, accumulated in ((4, 1), (2, 2)):
        own = recipe("bottleneck", n_epochs=1, batch_size=size, gradient_accumulation=accumulated)
        ends.append(Run(llama, own, tmp_path / str(size), trained=four, held_out=()).fit())
    (one,), (two,) = (end.memory.steps for end in ends)
    assert two.loss == pytest.approx(one.loss, rel=1e-6)
    assert two.grad_norm == pytest.approx(one.grad_norm, rel=1e-5)
    assert (one.tokens, two.tokens) == (15, 15)
    start = AdapterModel(llama, "tiny", recipe("bottleneck"))
    assert one.loss == pytest.approx(score(start, four).loss, rel=1e-6)


def test_checkpoints_hold_the_adapter_and_nothing_of_the_base(llama: Path, tmp_path: Path) -> None:
    run = Run(llama, recipe(), tmp_path).fit()
    newest = max(run.memory.checkpoints)
    folder = run.memory.checkpoints[newest]
    names = {path.name for path in folder.iterdir()} - {"best.safetensors"}
    assert names == {
        "adapter.safetensors",
        "optimizer.pt",
        "rng_state.pth",
        "scheduler.pt",
        "trainer_state.json",
    }
    assert load_file(folder / "adapter.safetensors").keys() == run.model.state().keys()
    numbers = sum(tensor.numel() for tensor in run.model.state().values())
    assert (folder / "optimizer.pt").stat().st_size < 3 * 4 * numbers + 100_000
    assert len(list(tmp_path.iterdir())) == 2  # older ones are removed


def test_the_best_adapter_is_what_remains(llama: Path, tmp_path: Path) -> None:
    """A learning rate that is too high at the end of training: later evaluations are worse."""
    run = Run(llama, recipe(n_epochs=6, learning_rate=0.1, scheduler="constant"), tmp_path).fit()
    best = min(run.memory.evaluations, key=lambda e: e.loss)
    assert best.step < run.trainer.total
    assert [e.best for e in run.memory.evaluations].count(True) >= 1
    assert score(run.model, run.trainer.plan.examples).loss == best.loss
    assert run.memory.steps[-1].step == run.trainer.total


def test_it_stops_early_when_evaluations_get_no_better(llama: Path, tmp_path: Path) -> None:
    own = recipe(n_epochs=10, learning_rate=0.1, scheduler="constant", early_stopping=2)
    run = Run(llama, own, tmp_path).fit()
    assert [e.best for e in run.memory.evaluations[-2:]] == [False, False]
    last = run.memory.steps[-1].step
    assert last == run.memory.evaluations[-1].step < run.trainer.total
    ((level, message),) = run.memory.events
    assert level == "info"
    assert f"step {last} of {run.trainer.total}" in message
    assert "2 evaluations in a row were no better" in message
    again = Run(llama, own, tmp_path / "again")
    again.fit(run.memory.checkpoints[last])
    assert again.memory.steps == []  # it had ended
    assert again.ended() == run.ended()


@pytest.mark.parametrize("wish", ["cancel", "lost"])
def test_what_is_cancelled_stops_at_that_step_and_leaves_nothing(
    llama: Path, tmp_path: Path, wish: Any
) -> None:
    memory = Memory(until(3, wish))
    with pytest.raises(Stopped) as caught:
        Run(llama, recipe(), tmp_path, memory).fit()
    assert caught.value.signal == wish
    assert [s.step for s in memory.steps] == [1, 2, 3]
    assert max(memory.checkpoints, default=0) < 3


def test_a_pause_leaves_a_checkpoint_of_that_step_and_what_it_measured(llama: Path, tmp_path: Path) -> None:
    memory = Memory(until(6, "pause"))
    with pytest.raises(Stopped):
        Run(llama, recipe(), tmp_path, memory).fit()
    done = memory.steps[-1]
    assert memory.metrics[-1] == {
        "step": 6,
        "train_loss": done.loss,
        "train_mean_token_accuracy": done.accuracy,
        "valid_loss": memory.evaluations[-1].loss,
        "valid_mean_token_accuracy": memory.evaluations[-1].accuracy,
    }


def test_a_loss_that_is_no_number_ends_it_with_step_and_learning_rate(llama: Path, tmp_path: Path) -> None:
    memory = Memory()
    own = recipe("bottleneck", learning_rate=10.0, warmup_ratio=0.0)
    run = Run(llama, own, tmp_path, memory)
    with torch.no_grad():
        for parameter in run.model.params.values():
            parameter.fill_(1e30)
    with pytest.raises(NonFinite, match=r"in step 1 of 12, at a learning rate of 10; a lower") as caught:
        run.fit()
    assert (caught.value.code, caught.value.param) == ("non_finite_loss", "learning_rate")
    assert memory.checkpoints == {}


def test_it_ends_before_its_time_is_over_and_keeps_what_there_is(llama: Path, tmp_path: Path) -> None:
    def slow(_done: StepDone) -> Any:
        time.sleep(0.3)
        return "go"

    run = Run(llama, recipe(n_epochs=10, max_seconds=1), tmp_path, Memory(slow)).fit()
    last = run.memory.steps[-1].step
    assert last < run.trainer.total
    assert last == run.memory.evaluations[-1].step == max(run.memory.checkpoints)
    assert run.memory.events[0][1].startswith(
        f"Training stopped early, after step {last} of 60: max_seconds (1)"
    )


def test_checkpoints_also_come_with_time(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CHECKPOINT_SECONDS", 0.0)
    run = Run(llama, recipe(n_epochs=1), tmp_path, held_out=()).fit()
    assert list(run.memory.checkpoints) == [1, 2, 3, 4, 5, 6]
    assert run.trainer.best is None


def test_only_matrices_decay(llama: Path, tmp_path: Path) -> None:
    trainer = Run(llama, recipe("bottleneck", weight_decay=0.1), tmp_path).trainer
    decaying, others = trainer.create_optimizer().param_groups
    assert (decaying["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    assert {p.ndim for p in decaying["params"]} == {2}
    assert {p.ndim for p in others["params"]} == {1}
    assert len(decaying["params"]) + len(others["params"]) == len(trainer.model.params)


@pytest.mark.parametrize(
    ("scheduler", "expected"),
    [
        ("linear", [0.0, 0.5, 1.0, 0.75, 0.5, 0.25]),
        ("constant", [0.0, 0.5, 1.0, 1.0, 1.0, 1.0]),
        ("cosine", [0.0, 0.5, 1.0, 0.8536, 0.5, 0.1464]),
    ],
)
def test_the_learning_rate_rises_and_falls_as_the_recipe_says(
    llama: Path, tmp_path: Path, scheduler: Any, expected: list[float]
) -> None:
    own = recipe("bitfit", n_epochs=1, learning_rate=1e-3, warmup_ratio=0.3, scheduler=scheduler)
    steps = Run(llama, own, tmp_path, held_out=()).fit().memory.steps
    assert [s.learning_rate for s in steps] == pytest.approx([1e-3 * share for share in expected], rel=1e-3)


def test_the_base_stays_as_it_was(llama: Path, tmp_path: Path) -> None:
    run = Run(llama, recipe(), tmp_path)
    before = run.model.frozen.digest()
    run.fit()
    assert run.model.frozen.digest() == before


def test_what_was_logged_reads_back_as_the_history(llama: Path, tmp_path: Path) -> None:
    run = Run(llama, recipe(), tmp_path).fit()
    assert TrainingLog.read(run.trainer.state.log_history) == run.trainer.training_log
