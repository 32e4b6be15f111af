import csv
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
import torch
from safetensors.torch import load_file

from server.base_model.tokenizer import Tokenizer
from server.errors import InvalidField
from server.finetune.data.dataset import load
from server.finetune.modeling.adapter_model import AdapterModel
from server.finetune.recipe_methods import PromptRecipe
from server.finetune.training.observer import Stopped
from server.finetune.training.run import TrainingOutput, run_training
from tests.fixtures.models import Oracle
from tests.server.finetune.small_trainings import PEFTS, Memory, recipe, until, write


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small only wait for a second one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def llama(tiny_models: Callable[[str], Path]) -> Path:
    return tiny_models("llama")


@pytest.fixture
def training(tmp_path: Path) -> Path:
    records = [{"prompt": f"Is {i} even? ", "completion": "no" if i % 2 else "yes"} for i in range(24)]
    return write(tmp_path / "training.jsonl", records)


def tensors(trained: TrainingOutput) -> dict[str, list[float]]:
    (path,) = trained.adapter.glob("*.safetensors")
    return {name: tensor.flatten().tolist() for name, tensor in load_file(path).items()}


@pytest.mark.parametrize("method", PEFTS)
def test_files_become_a_better_adapter_and_its_papers(
    llama: Path, training: Path, tmp_path: Path, method: str
) -> None:
    rate = 0.3 if method == "prefix" else 0.01  # keys and values of a random model are far from any use
    own = recipe(method, n_epochs=3, batch_size=4, learning_rate=rate)
    work, memory = tmp_path / "work", Memory()
    trained = run_training(own, llama, training, None, work, memory, base_id="tiny")
    assert trained.better is True
    assert trained.evaluation is not None
    assert trained.evaluation["adapter"]["loss"] < trained.evaluation["base"]["loss"] - 0.5
    assert trained.evaluation["adapter"]["label_accuracy"] >= 0.5
    json.dumps(trained.evaluation, allow_nan=False)
    assert (trained.steps, trained.trained_tokens) == (memory.steps[-1].step, memory.steps[-1].tokens)
    assert len(list(trained.adapter.iterdir())) == 2
    with trained.metrics.open(encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    assert [int(line["step"]) for line in lines] == [s.step for s in memory.steps]
    assert sum(bool(line["valid_loss"]) for line in lines) == len(memory.evaluations)
    assert trained.plot.read_bytes()[:4] == b"\x89PNG"


def test_what_it_saves_is_what_it_evaluated(llama: Path, training: Path, tmp_path: Path) -> None:
    own = recipe(n_epochs=2, batch_size=4)
    trained = run_training(own, llama, training, training, tmp_path / "work", Memory(), base_id="tiny")
    examples = load(training, Tokenizer.load(llama), 64)
    losses = weights = 0.0
    with Oracle(llama).using(trained.adapter) as model:
        for e in examples:
            logits = model(torch.tensor([e.tokens])).logits[0, :-1]
            every = torch.nn.functional.cross_entropy(logits, torch.tensor(e.tokens[1:]), reduction="none")
            losses += float((every * torch.tensor(e.weights[1:])).sum())
            weights += sum(e.weights)
    assert trained.evaluation is not None
    assert trained.evaluation["adapter"]["loss"] == pytest.approx(losses / weights, rel=1e-4)
    assert trained.evaluation["examples"] == 24


def test_the_same_files_give_the_same_result_however_often_it_is_paused(
    llama: Path, training: Path, tmp_path: Path
) -> None:
    own = recipe(n_epochs=2, batch_size=4)
    whole = run_training(own, llama, training, None, tmp_path / "whole", Memory(), base_id="tiny")
    checkpoint: Path | None = None
    for step in (2, 5, 9, 12):
        memory = Memory(until(step, "pause"))
        work = tmp_path / f"until-{step}"
        if step < whole.steps:
            with pytest.raises(Stopped):
                run_training(own, llama, training, None, work, memory, checkpoint, base_id="tiny")
            checkpoint = Path(shutil.move(memory.checkpoints[step], tmp_path / f"kept-{step}"))
        else:
            pieces = run_training(own, llama, training, None, work, Memory(), checkpoint, base_id="tiny")
    assert tensors(pieces) == tensors(whole)
    assert pieces.evaluation == whole.evaluation
    assert pieces.metrics.read_bytes() == whole.metrics.read_bytes()
    assert (pieces.steps, pieces.trained_tokens) == (whole.steps, whole.trained_tokens)


def test_without_anything_held_out_there_is_no_evaluation(
    llama: Path, training: Path, tmp_path: Path
) -> None:
    own = recipe(n_epochs=1, eval_share=0.0)
    trained = run_training(own, llama, training, None, tmp_path / "work", Memory(), base_id="tiny")
    assert (trained.evaluation, trained.better) == (None, None)
    assert trained.steps == 12


def test_a_validation_file_is_what_it_is_evaluated_on(llama: Path, training: Path, tmp_path: Path) -> None:
    validation = write(tmp_path / "validation.jsonl", [{"prompt": "Is 99 even? ", "completion": "no"}])
    own = recipe(n_epochs=1)
    trained = run_training(own, llama, training, validation, tmp_path / "work", Memory(), base_id="tiny")
    assert trained.evaluation is not None
    assert trained.evaluation["examples"] == 1
    assert trained.steps == 12  # nothing of the training file is held out


@pytest.mark.parametrize("text", ["", "Answer yes or no."])
def test_virtual_tokens_start_as_a_text(llama: Path, training: Path, tmp_path: Path, text: str) -> None:
    """The recipe's own, or the beginning of the training data."""
    peft = PromptRecipe(num_virtual_tokens=4, init_text=text)
    own = recipe("prompt", n_epochs=1, learning_rate=1e-12, eval_share=0.0)
    own = msgspec.structs.replace(own, peft=peft)
    trained = run_training(own, llama, training, None, tmp_path / "work", Memory(), base_id="tiny")
    tokenizer = Tokenizer.load(llama)
    first = load(training, tokenizer, 64)[0].tokens
    expected = AdapterModel(llama, "tiny", own, init_text=tokenizer.encode(text, special=False) or first)
    (found,) = tensors(trained).values()
    (start,) = expected.state().values()
    assert found == pytest.approx(start.flatten().tolist(), abs=1e-6)


def test_threads_are_set_for_the_process(llama: Path, training: Path, tmp_path: Path) -> None:
    memory = Memory(lambda _: "cancel" if torch.get_num_threads() == 2 else "go")
    with pytest.raises(Stopped):
        run_training(recipe(), llama, training, None, tmp_path / "work", memory, base_id="tiny", threads=2)
    assert len(memory.steps) == 1


def test_a_file_without_an_example_is_refused(llama: Path, tmp_path: Path) -> None:
    empty = write(tmp_path / "empty.jsonl", [])
    with pytest.raises(InvalidField, match="training_file") as caught:
        run_training(recipe(), llama, empty, None, tmp_path / "work", Memory(), base_id="tiny")
    assert caught.value.param == "training_file"
