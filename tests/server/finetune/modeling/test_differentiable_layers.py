from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from server.finetune.data.examples import Example
from server.finetune.modeling import adapter_model as trainable
from server.finetune.modeling.adapter_model import AdapterModel
from server.finetune.modeling.batch_loss import Batch
from server.finetune.modeling.differentiable_layers import TrainingDecoder
from server.kernels.cpu.openmp import AVAILABLE
from tests.server.finetune.small_trainings import PEFTS, examples, recipe

pytestmark = pytest.mark.skipif(not AVAILABLE, reason="these layers need OpenMP")

TinyModels = Callable[[str], Path]


def gradients(model: AdapterModel, batch: list[Example]) -> list[torch.Tensor]:
    """The loss, and what it is upon every tensor of the adapter; dropout is off."""
    model.zero_grad()
    output = model.eval()(Batch.of(batch))
    output.loss_sum.backward()
    return [output.loss_sum.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


def assert_close(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


def by_class(folder: Path, method: str, monkeypatch: pytest.MonkeyPatch) -> AdapterModel:
    with monkeypatch.context() as patch:
        patch.setattr(trainable, "install_training_layers", lambda *_: None)
        return AdapterModel(folder, "tiny", recipe(method))


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral"])  # with norms of heads; with windows
@pytest.mark.parametrize("method", PEFTS)
def test_losses_and_gradients_are_those_of_the_classes(
    tiny_models: TinyModels, family: str, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = AdapterModel(tiny_models(family), "tiny", recipe(method))
    plain = by_class(tiny_models(family), method, monkeypatch)
    assert isinstance(ours.causal_lm.layers, TrainingDecoder)
    assert plain.causal_lm.layers is None
    batch = examples(3)
    batch[1].weights[4] = 0.5  # targets that do not stand at the end
    assert_close(gradients(ours, batch), gradients(plain, batch))
    ours.memory = plain.memory = 0  # layers are computed once more in backward
    assert_close(gradients(ours, batch), gradients(plain, batch))


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "olmo2"])
def test_other_models_stay_with_their_classes(tiny_models: TinyModels, family: str) -> None:
    assert AdapterModel(tiny_models(family), "tiny", recipe("bitfit")).causal_lm.layers is None


def test_a_layer_that_is_off_is_left_to_its_class(
    tiny_models: TinyModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.finetune.modeling.differentiable_layers.gated", lambda gate, up: gate * up)
    assert AdapterModel(tiny_models("llama"), "tiny", recipe()).causal_lm.layers is None


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral"])
@pytest.mark.parametrize("method", ["prefix", "prompt"])
def test_virtual_tokens_that_are_computed_once_serve_all_sequences(
    tiny_models: TinyModels, family: str, method: str
) -> None:
    model = AdapterModel(tiny_models(family), "tiny", recipe(method))
    batch = examples(3)
    alone = [gradients(model, [example]) for example in batch]
    together = [sum(parts, torch.zeros(())) for parts in zip(*alone, strict=True)]
    assert_close(gradients(model, batch), together)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_batch_may_have_nothing_to_learn(tiny_models: TinyModels, family: str) -> None:
    model = AdapterModel(tiny_models(family), "tiny", recipe())
    output = model(Batch.of([Example([5, 6, 7], [0.0, 0.0, 0.0], 3)]))
    output.loss_sum.backward()
    assert float(output.loss_sum.detach()) == output.weight_sum == 0
