"""Which models run by our kernels, and which stay with their classes."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import GraniteConfig, GraniteForCausalLM

from server.engine.model.base_model import Placement
from server.engine.model.module_hooks import decoder_layers
from server.engine.served_model import ServedModel
from server.kernels.cpu.int8.linear import int8_linear_reference
from server.kernels.cpu.int8.quantization import quantize
from server.kernels.cpu.int8.vnni_linear import FASTEST_INT8, VnniLinear, vnni_linear_reference
from server.kernels.cpu.openmp import AVAILABLE
from server.kernels.weight_formats import INT8
from server.messages import Generate, Sampling
from tests.fixtures.engine import Stand, record_logits, run, same
from tests.server.engine.test_mixed_methods import kinds

pytestmark = pytest.mark.skipif(not AVAILABLE, reason="needs numba and libgomp")

CPU = Placement(torch.device("cpu"), torch.float32)


def served(folder: Path, placement: Placement = CPU) -> ServedModel:
    return ServedModel(folder, "tiny", placement, kv_bytes=1 << 22, max_context=0)


def by_kernels(model: ServedModel) -> bool:
    """Whether all layers run so; some alone never do."""
    own = ["forward" in vars(layer) for _, layer in decoder_layers(model.model, model.base.layers)]
    assert set(own) == {model.decoder is not None}
    return model.decoder is not None


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("llama", True),
        ("qwen2", True),
        ("qwen3", True),
        ("mistral", True),
        ("gemma2", False),
        ("gpt2", False),
        ("olmo2", False),
    ],
)
def test_who_is_built_like_a_llama(family: str, expected: bool, tiny_models: Callable[[str], Path]) -> None:
    model = served(tiny_models(family))
    assert by_kernels(model) is expected
    assert not any(pages[0].any() for pages in model.step.pages.keys), "the probe leaves nothing behind"


def test_a_model_that_scales_in_its_own_way_stays_with_its_class(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = GraniteConfig(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        residual_multiplier=0.5,
    )
    GraniteForCausalLM(config).save_pretrained(tmp_path)
    model = served(tmp_path)
    assert not by_kernels(model)
    assert "runs by its class" in caplog.text


def test_int8_runs_by_kernels_and_is_the_same_base(tiny_models: Callable[[str], Path]) -> None:
    folder = tiny_models("llama")
    int8 = served(folder, Placement(CPU.device, CPU.dtype, INT8))
    assert by_kernels(int8)
    assert int8.base.digest == served(folder).base.digest, "adapters of one are adapters of the other"
    assert int8.digest() != int8.base.digest, "what is held is not what came"


def test_in_int8_each_row_gets_what_it_gets_alone(stand: Callable[..., Stand]) -> None:
    s = stand("llama", 0, max_batch_tokens=48, quantize="int8")
    commands = [s.generate(i, ref) for i, ref in enumerate([*kinds(s).values(), None, None])]
    expected = s.alone(commands)
    for done, alone in zip(run(s.engine, commands), expected, strict=True):
        assert done.error is None
        same(done, alone)


class Twin(nn.Module):
    """A linear of transformers' model over int8: the plain twin of the kernel that this processor takes."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.held, self.bias = quantize(linear.weight.detach()), linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        twin = vnni_linear_reference if FASTEST_INT8 is VnniLinear else int8_linear_reference
        return twin(x.flatten(0, -2), *self.held, self.bias).view(*x.shape[:-1], -1)


@pytest.mark.parametrize(("layout", "error"), [("none", 1e-5), ("int8", 2e-2)])
def test_a_users_logits_are_those_of_transformers(
    stand: Callable[..., Stand], layout: str, error: float
) -> None:
    """Of int8 a number here or there is rounded another way, where both are as near."""
    s = stand("llama", 0, quantize=layout, lookup_tokens=0)
    if layout == "int8":
        for name, module in list(s.base.named_modules()):
            if isinstance(module, nn.Linear):
                s.base.set_submodule(name, Twin(module))
    found = record_logits(s.engine)
    for i, length in enumerate((1, 5, 17, 70)):
        prompt = s.prompt(i, length)
        sampling = Sampling(max_tokens=4, temperature=0.0, ignore_eos=True)
        (done,) = run(s.engine, [Generate(f"{i}", "t", prompt, sampling)])
        with torch.no_grad():
            expected = s.base(torch.tensor([prompt + done.tokens[:-1]])).logits[0, length - 1 :]
        off = (torch.stack(found[f"{i}"]) - expected).norm(dim=1) / expected.norm(dim=1)
        assert off.max() < error
        behind = expected.amax(1) - expected[torch.arange(4), torch.tensor(done.tokens)]
        assert (behind <= 2 * error * expected.norm(dim=1)).all(), "the best token, or one as good"
