"""Training against PEFT: the same start, data and optimizer give the same losses and tensors, in fp32.

PEFT reads the start from the very files that `Trainable.save` wrote. Where PEFT has no such method
(bottlenecks, BitFit) the oracle is the plain formula, hooked into transformers' own modules.
"""

import json
import random
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from server.finetune.data.dataset import Example
from server.finetune.modeling.adapter_model import AdapterModel
from server.finetune.modeling.batch_loss import Batch
from server.finetune.recipe_methods import (
    BitfitRecipe,
    BottleneckRecipe,
    LoraRecipe,
    Peft,
    PrefixRecipe,
    PromptRecipe,
)
from tests.fixtures.models import FAMILIES, load_model, quiet
from tests.oracles.bench import linears
from tests.server.finetune.small_trainings import recipe

STEPS, RATE = 6, 3e-3
TOLERANCE = 1e-4
BLOCKS = {"gpt2": (("attn", "ln_1"), ("mlp", "ln_2"))}
LLAMA_BLOCKS = (("self_attn", "input_layernorm"), ("mlp", "post_attention_layernorm"))
GEMMA_BLOCKS = (("self_attn", "input_layernorm"), ("mlp", "pre_feedforward_layernorm"))


def examples(count: int) -> list[Example]:
    """Lengths about the windows (8) of Mistral's and Gemma's tiny models, and well over them."""
    rng = random.Random(3)
    lengths = [rng.choice((4, 8, 9, 21, 40)) for _ in range(count)]
    tokens = [[rng.randrange(3, 300) for _ in range(n)] for n in lengths]
    return [Example(own, [0.0, 0.0, *(1.0 for _ in own[2:])]) for own in tokens]


class Oracle(Protocol):
    parameters: list[torch.Tensor]

    def loss(self, example: Example) -> torch.Tensor: ...
    def tensors(self) -> dict[str, torch.Tensor]: ...


def loss_of(model: Any, example: Example) -> torch.Tensor:
    pairs = zip(example.tokens, example.weights, strict=True)
    labels = torch.tensor([[token if weight else -100 for token, weight in pairs]])
    loss: torch.Tensor = model(input_ids=torch.tensor([example.tokens]), labels=labels).loss
    return loss


class PeftOracle:
    def __init__(self, base: Path, adapter: Path) -> None:
        from peft import PeftModel

        virtual = "num_virtual_tokens" in json.loads((adapter / "adapter_config.json").read_text())
        self.model = PeftModel.from_pretrained(load_model(base), adapter, is_trainable=not virtual).eval()
        if virtual:  # PEFT loads those for inference only, but trains them all the same
            self.model.prompt_encoder.requires_grad_(True)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]

    def loss(self, example: Example) -> torch.Tensor:
        return loss_of(self.model, example)

    def tensors(self) -> dict[str, torch.Tensor]:
        from peft import get_peft_model_state_dict

        return dict(get_peft_model_state_dict(self.model))


class PlainOracle:
    """A transformers model with the saved tensors hooked in."""

    def __init__(self, base: Path, adapter: Path) -> None:
        (weights,) = adapter.glob("*.safetensors")
        self.own = {name: t.requires_grad_() for name, t in load_file(weights).items()}
        self.parameters = list(self.own.values())
        self.model = load_model(base).requires_grad_(False)
        config = json.loads((adapter / "adapter_config.json").read_text())
        if "config" in config:
            self._hook_bottlenecks(config["config"])
        else:
            for name, bias in self.own.items():
                module = self.model.get_submodule(
                    name.removeprefix("base_model.model.").removesuffix(".bias")
                )
                module.register_forward_hook(lambda _m, _x, y, bias=bias: y + bias)

    def loss(self, example: Example) -> torch.Tensor:
        return loss_of(self.model, example)

    def tensors(self) -> dict[str, torch.Tensor]:
        return self.own

    def _hook_bottlenecks(self, config: dict[str, Any]) -> None:
        kind = self.model.config.model_type
        blocks = BLOCKS.get(kind, GEMMA_BLOCKS if kind == "gemma2" else LLAMA_BLOCKS)
        layers = self.model.transformer.h if kind == "gpt2" else self.model.model.layers
        path = "transformer.h" if kind == "gpt2" else "model.layers"
        behind: dict[str, Any] = {}
        if kind == "gemma2":  # AdapterHub's hooks all hold the last layer's norms
            behind = {"mlp": layers[-1].post_feedforward_layernorm}
        for i, layer in enumerate(layers):
            for (leaf, norm), place in zip(blocks, ("attention_adapters", "output_adapters"), strict=True):
                at = f"{path}.{i}.{place}.adapters.tuned"
                if f"{at}.adapter_up.bias" in self.own:
                    residual: list[torch.Tensor] = []
                    getattr(layer, norm).register_forward_pre_hook(partial(keep, residual))
                    names = (
                        "adapter_down.0.weight",
                        "adapter_down.0.bias",
                        "adapter_up.weight",
                        "adapter_up.bias",
                    )
                    tensors = [self.own[f"{at}.{name}"] for name in names]
                    hook = partial(bottleneck, config, tensors, residual, behind.get(leaf))
                    getattr(layer, leaf).register_forward_hook(hook)


def keep(residual: list[torch.Tensor], _norm: Any, args: tuple[torch.Tensor, ...]) -> None:
    residual[:] = [args[0]]


def bottleneck(
    config: dict[str, Any],
    tensors: list[torch.Tensor],
    residual: list[torch.Tensor],
    norm: Any,
    _block: Any,
    _args: Any,
    output: Any,
) -> Any:
    """h + s (U act(D x + d) + u), with x as the config has it."""
    h = output[0] if isinstance(output, tuple) else output
    x = residual[0] if config["is_parallel"] else h
    if config["original_ln_before"]:
        x = h + residual[0]
        x = x if norm is None else norm(x)
    down, down_bias, up, up_bias = tensors
    act = {"relu": F.relu, "swish": F.silu}[config["non_linearity"]]
    h = h + config["scaling"] * F.linear(act(F.linear(x, down, down_bias)), up, up_bias)
    return (h, *output[1:]) if isinstance(output, tuple) else h


METHODS: dict[str, Callable[[str], Peft]] = {
    "lora": lambda family: LoraRecipe(r=4, lora_dropout=0, target_modules=tuple(linears(family))),
    "rslora": lambda family: LoraRecipe(
        r=8, lora_alpha=4, lora_dropout=0, use_rslora=True, target_modules=tuple(linears(family)[:2])
    ),
    "dora": lambda family: LoraRecipe(
        r=4, lora_dropout=0, use_dora=True, target_modules=tuple(linears(family))
    ),
    "prefix": lambda _: PrefixRecipe(num_virtual_tokens=5),
    "prompt": lambda _: PromptRecipe(num_virtual_tokens=5),
    "seq_bn": lambda _: BottleneckRecipe(reduction_factor=8),
    "double_seq_bn": lambda _: BottleneckRecipe(placement="double_seq_bn", non_linearity="silu", scaling=0.5),
    "par_bn": lambda _: BottleneckRecipe(placement="par_bn", scaling=4),
    "bitfit": lambda _: BitfitRecipe(),
    "bitfit of norms": lambda _: BitfitRecipe(biases="norm"),
}
PEFT_HAS = ("lora", "rslora", "dora", "prefix", "prompt")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Batches this small only wait for a second one, for long where others want the cores too."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", METHODS)
def test_the_same_steps(family: str, method: str, tiny_models: Callable[[str], Path], tmp_path: Path) -> None:
    if family == "olmo2" and "bn" in method:
        pytest.skip("a base that no bottleneck adapter is served on")
    base = tiny_models(family)
    ours = AdapterModel(base, "tiny", recipe(peft=METHODS[method](family)))
    ours.save(tmp_path / "start")
    with quiet():
        kind = PeftOracle if method in PEFT_HAS else PlainOracle
        oracle: Oracle = kind(base, tmp_path / "start")
        compare(ours, oracle)


def compare(ours: AdapterModel, oracle: Oracle, *, worst: float = 0.02) -> None:
    """`worst`: how far any element may be off, of what one step of Adam moves it at most."""
    # with Adam's usual epsilon a gradient that is zero but for rounding would move its tensor all the same
    optimizers = [
        torch.optim.AdamW(own, lr=RATE, eps=1e-4, weight_decay=0.1)
        for own in (list(ours.parameters()), oracle.parameters)
    ]
    start = ours.state()
    assert start.keys() == oracle.tensors().keys()
    ours.train()
    first = last = 0.0
    for step, example in enumerate(examples(STEPS)):
        output = ours(Batch.of([example]))
        losses = [output.loss_sum / output.weight_sum, oracle.loss(example)]
        for loss, optimizer in zip(losses, optimizers, strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        found, expected = (float(loss.detach()) for loss in losses)
        assert found == pytest.approx(expected, abs=TOLERANCE), f"step {step}"
        first, last = first or found, found
    assert first != last
    end = ours.state()
    for name, tensor in oracle.tensors().items():
        moved = (end[name] - start[name]).abs().max()
        error = (end[name] - tensor.detach()).abs().max()
        assert error <= worst * RATE, name
        assert moved > RATE / 10, f"{name} was not trained"


def test_smollm2_takes_the_same_steps(smollm2: Path, tmp_path: Path) -> None:
    own = LoraRecipe(r=8, lora_dropout=0, target_modules=tuple(linears("llama")))
    ours = AdapterModel(smollm2, "smollm2", recipe(peft=own))
    ours.save(tmp_path)
    with quiet():
        compare(ours, PeftOracle(smollm2, tmp_path), worst=0.05)  # thirty layers' rounding
