"""What the arms are given: random LoRA adapters as PEFT saves them, and prompts of one length."""

from pathlib import Path
from typing import Any

import torch

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RANK = 16
# A's output has about the size of its input, B's a twentieth of that: clearly not the base any more, and
# still a language model, whose best token is seldom a matter of rounding.
SCALE = 0.05


def make_adapters(model: Path, folder: Path, count: int) -> tuple[list[Path], int]:
    """Save `count` distinct adapters of rank 16 on all seven linears; their folders, and one's parameters."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, local_files_only=True)
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=LINEARS, task_type="CAUSAL_LM")
    adapted: Any = get_peft_model(base, config)
    weights = {n: w for n, w in adapted.named_parameters() if w.requires_grad}
    folders = [folder / f"adapter-{i}" for i in range(count)]
    with torch.no_grad():
        for seed, target in enumerate(folders):
            torch.manual_seed(seed)
            for name, weight in weights.items():
                weight.normal_(0, (SCALE if "lora_B" in name else 1.0) * weight.shape[-1] ** -0.5)
            adapted.save_pretrained(target, save_embedding_layers=False)
    return folders, sum(weight.numel() for weight in weights.values())


def make_prompts(model: Path, count: int, tokens: int) -> list[list[int]]:
    """Distinct stretches of this project's own source, `tokens` long each."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True)
    sources = sorted((Path(__file__).resolve().parents[2] / "server").rglob("*.py"))
    prompts: list[list[int]] = []
    for source in sources:
        ids: list[int] = tokenizer(source.read_text(encoding="utf-8"), verbose=False)["input_ids"]
        prompts += [ids[at : at + tokens] for at in range(0, len(ids) - tokens, tokens)]
        if len(prompts) >= count:
            return prompts[:count]
    raise ValueError(f"the sources yield {len(prompts)} prompts of {tokens} tokens, and {count} are needed")
