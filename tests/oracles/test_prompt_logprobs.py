"""Prompt logprobs of the engine against PEFT and transformers, which compute all logits of the whole text."""

from pathlib import Path

import pytest
import torch

from server.messages import Generate, Sampling
from tests.fixtures.adapters import make_bitfit, make_prefix, make_prompt
from tests.fixtures.models import logits_of, make_lora
from tests.oracles.bench import LENGTHS, TOLERANCE, WORST_REAL, Bench, linears
from tests.server.engine.scores import score

K = 5


def compare(bench: Bench, adapters: list[Path | None], prompts: list[list[int]], worst: float) -> None:
    """All adapters in one batch: logprob, rank and the best tokens of every prompt token."""
    sampling = Sampling(max_tokens=1, temperature=0.0, prompt_logprobs=K, seed=0)
    refs = [bench.publish(adapter) if adapter else None for adapter in adapters]
    commands = [
        Generate(f"score {i} {j}", "tenant", prompt, sampling, ref)
        for i, ref in enumerate(refs)
        for j, prompt in enumerate(prompts)
    ]
    found = dict(zip([c.id for c in commands], score(bench.engine, commands), strict=True))
    for i, adapter in enumerate(adapters):
        with bench.oracle.using(adapter) as model:
            for j, prompt in enumerate(prompts):
                own = found[f"score {i} {j}"]
                if len(prompt) == 1:
                    assert own.logprobs == []
                    continue
                logprobs = logits_of(model, prompt[:1], prompt[1:]).log_softmax(-1)
                targets = torch.tensor(prompt[1:])[:, None]
                expected = logprobs.gather(-1, targets)
                assert torch.allclose(torch.tensor(own.logprobs), expected[:, 0], rtol=0, atol=worst)
                best = logprobs.topk(K)
                values = torch.tensor([[p for _, p in top] for top in own.tops])
                assert torch.allclose(values, best.values, rtol=0, atol=worst)
                lowest = 1 + (logprobs > expected + worst).sum(-1)
                highest = 1 + (logprobs > expected - worst).sum(-1)
                ranks = torch.tensor(own.ranks)
                assert ((lowest <= ranks) & (ranks <= highest)).all()


def test_tiny_models(tiny: tuple[str, Bench]) -> None:
    family, bench = tiny
    base, folder, modules = bench.oracle.base, bench.folder, linears(family)
    adapters = [
        None,
        make_lora(base, folder / "lora", r=4, target_modules=modules),
        make_prefix(base, folder / "prefix", 5),
        make_prompt(base, folder / "prompt", 20),
        make_bitfit(base, folder / "bitfit", modules),
    ]
    compare(bench, adapters, bench.prompts(LENGTHS), TOLERANCE)


@pytest.mark.parametrize("adapter", ["base", "lora"])
def test_smollm2(real: Bench, adapter: str) -> None:
    folder = None
    if adapter == "lora":
        modules = linears("llama")
        folder = make_lora(real.oracle.base, real.folder / "scored", scale=0.1, r=4, target_modules=modules)
    compare(real, [folder], real.texts(), WORST_REAL)
