from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from server.engine.model.linear_sites import LinearSite
from server.finetune.modeling import onednn_linear as linear
from server.finetune.modeling.adapter_model import AdapterModel
from server.finetune.modeling.batch_loss import Batch
from server.finetune.modeling.onednn_linear import OneDnnLinear
from tests.server.finetune.small_trainings import PEFTS, examples, recipe


def trained(model: AdapterModel) -> list[OneDnnLinear]:
    return [module for module in model.frozen.model.modules() if isinstance(module, OneDnnLinear)]


def gradients(model: AdapterModel) -> list[torch.Tensor]:
    """Of a loss, upon every tensor of the adapter; dropout is off."""
    output = model(Batch.of(examples(3)))
    output.loss_sum.backward()
    return [output.loss_sum.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2"])  # without biases; Conv1D; with some
@pytest.mark.parametrize("method", PEFTS)
def test_losses_and_gradients_are_those_of_plain_weights(
    tiny_models: Callable[[str], Path], family: str, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = recipe(method if family == "llama" or method not in ("lora", "dora") else "bitfit")
    laid_out = AdapterModel(tiny_models(family), "tiny", own)
    monkeypatch.setattr(linear, "machine_bytes", lambda: 0)
    plain = AdapterModel(tiny_models(family), "tiny", own)
    assert trained(laid_out)
    assert not trained(plain)
    assert any(isinstance(module, LinearSite) for module in plain.frozen.model.modules())
    found, expected = gradients(laid_out.eval()), gradients(plain.eval())
    assert len(found) == len(expected) == 1 + len(list(plain.parameters()))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


def test_the_base_stays_what_it_was(tiny_models: Callable[[str], Path]) -> None:
    model = AdapterModel(tiny_models("llama"), "tiny", recipe())
    gradients(model)
    assert model.frozen.digest() == model.base.digest
    assert not any(p.requires_grad for p in model.frozen.model.parameters())
