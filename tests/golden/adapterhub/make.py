"""Record what AdapterHub's own library computes: run by hand, its results are committed beside this file.

    python -m venv hub && hub/bin/pip install torch==2.13.0 adapters==1.3.0
    hub/bin/python tests/golden/adapterhub/make.py            # the tiny families
    hub/bin/python tests/golden/adapterhub/make.py FOLDER     # the default model, converted into FOLDER

The library pins an older transformers and cannot be installed beside ours, so that the tests read from here:

    FAMILY/base/            a tiny random base; its weights are float16, computed with in float32
    FAMILY/golden.safetensors   for each adapter and prompt: greedy tokens and the logits they came from
    FAMILY/ADAPTER/         what the library's save_adapter wrote
    prompts.json            the prompts, by name
    ../smollm2/             the same for the default model; of its logits a sample, and where it was taken

Llama, Mistral and GPT-2 go through the library's built-in support, Qwen2, Qwen3 and Gemma2 through the
plugin interfaces it ships. Everything is computed uncached: with the cache the built-in Llama and Mistral
answer wrongly under transformers 4.57.6.
"""

import json
import shutil
import sys
import zlib
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import adapters
import torch
import transformers
from adapters import BnConfig, DoubleSeqBnConfig, ParBnConfig, SeqBnConfig
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

HERE = Path(__file__).resolve().parent
VOCABULARY, HIDDEN, NEW = 100, 32, 6
INIT = 0.3  # so wide that the best two logits lie far apart
MARGIN = 0.005  # fifty times what the tests allow
NAME = "tuned"  # the adapter's name inside its files

LLAMA: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", LLAMA),
    "gpt2": ("GPT2Config", {"n_embd": HIDDEN, "n_layer": 2, "n_head": 4, "n_positions": 128}),
    "mistral": ("MistralConfig", LLAMA | {"sliding_window": 8}),
    "qwen2": ("Qwen2Config", LLAMA),
    "qwen3": ("Qwen3Config", LLAMA),
    "gemma2": (
        "Gemma2Config",
        LLAMA
        | {
            "sliding_window": 8,
            "query_pre_attn_scalar": 8,
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 10.0,
        },
    ),
}
# The library's three named forms, on every family.
FORMS: dict[str, BnConfig] = {
    "seq_bn": SeqBnConfig(reduction_factor=8),
    "double_seq_bn": DoubleSeqBnConfig(reduction_factor=16),
    "par_bn": ParBnConfig(reduction_factor=4),
}
VARIATIONS: dict[str, BnConfig] = {
    "factors": DoubleSeqBnConfig(reduction_factor={"0": 4, "default": 20}),
    "leave_out": DoubleSeqBnConfig(reduction_factor=8, leave_out=[1]),
    "silu": SeqBnConfig(reduction_factor=8, non_linearity="silu"),
    "gelu": SeqBnConfig(reduction_factor=8, non_linearity="gelu"),
    "gelu_new": SeqBnConfig(reduction_factor=8, non_linearity="gelu_new"),
    "tanh": SeqBnConfig(reduction_factor=8, non_linearity="tanh"),
    "leakyrelu": SeqBnConfig(reduction_factor=8, non_linearity="leakyrelu"),
    "linear": SeqBnConfig(reduction_factor=8, non_linearity="linear"),
    "attention_only": SeqBnConfig(reduction_factor=8, mh_adapter=True, output_adapter=False),
    "learned": SeqBnConfig(reduction_factor=8, scaling="learned"),
    "channel": ParBnConfig(reduction_factor=8, scaling="channel"),
    "par_double": ParBnConfig(reduction_factor=8, mh_adapter=True),
    "widening": SeqBnConfig(reduction_factor=0.5),
    "residual_once": SeqBnConfig(reduction_factor=8, original_ln_after=False, residual_before_ln=False),
    "legacy": DoubleSeqBnConfig(reduction_factor=8, original_ln_before=True, non_linearity="gelu_new"),
}
# Where a variation meets something of the family's own: norms behind the sub-blocks, hooks, Conv1D.
ELSEWHERE = {
    "gpt2": ("factors", "channel"),
    "gemma2": ("attention_only", "learned", "par_double", "legacy"),
    "qwen2": ("leave_out",),
    "qwen3": ("legacy",),
    "mistral": ("learned",),
}
# Of the default model: bottlenecks of 4, 2 and 4, so that the files stay small.
REAL = "smollm2"
REAL_FORMS: dict[str, BnConfig] = {
    "seq_bn": SeqBnConfig(reduction_factor=144),
    "double_seq_bn": DoubleSeqBnConfig(reduction_factor=288),
    "par_bn": ParBnConfig(reduction_factor=144),
}
REAL_TEXTS = {
    "short": "The capital of France is",
    "long": "One frozen base model stays resident. Thousands of tenants bring small adapters. Every request "
    "names an adapter; rows that use different adapters, of different kinds, run in one batch. That is why",
}
BEST, OTHERS = 16, 240  # logits kept of each row: the best, and as many of fixed places
PICKLED = ("seq_bn", "legacy")  # of Llama's, saved as .bin, the library's default
LEGACY_KEYS = {
    "output_adapters.adapters": "output_adapters.layer_text_task_adapters",
    "attention_adapters.adapters": "attention_adapters.attention_text_lang_adapters",
}


def main() -> None:
    torch.set_num_threads(1)
    if len(sys.argv) > 1:
        make_real(Path(sys.argv[1]))
        return
    generator = torch.Generator().manual_seed(7)
    prompts = {str(n): torch.randint(VOCABULARY, (n,), generator=generator).tolist() for n in (1, 17, 45)}
    (HERE / "prompts.json").write_text(json.dumps(prompts) + "\n")
    for family in FAMILIES:
        folder = HERE / family
        shutil.rmtree(folder, ignore_errors=True)
        make_base(family, folder / "base")
        recorded: dict[str, torch.Tensor] = {}
        for name, config in chosen(family):
            found = record(folder / "base", folder / name, config, prompts)
            for prompt, (tokens, logits) in found.items():
                recorded |= {f"{name}/{prompt}/tokens": tokens, f"{name}/{prompt}/logits": logits}
        save_file(recorded, folder / "golden.safetensors")


def make_real(base: Path) -> None:
    """Adapters of the default model, mild as trained ones are: strong noise in 30 layers blurs any sum."""
    folder = HERE.parent / REAL
    shutil.rmtree(folder, ignore_errors=True)
    tokenizer = Tokenizer.from_file(str(base / "tokenizer.json"))
    prompts = {name: tokenizer.encode(text).ids for name, text in REAL_TEXTS.items()}
    others = torch.randperm(tokenizer.get_vocab_size(), generator=torch.Generator().manual_seed(7))[:OTHERS]
    recorded: dict[str, torch.Tensor] = {}
    for name, config in REAL_FORMS.items():
        for prompt, (tokens, logits) in record(base, folder / name, config, prompts, strength=0.1).items():
            ids = torch.cat([logits.topk(BEST).indices, others.expand(NEW, OTHERS)], dim=1)
            recorded |= {
                f"{name}/{prompt}/tokens": tokens,
                f"{name}/{prompt}/ids": ids.int(),
                f"{name}/{prompt}/logits": logits.gather(1, ids),
            }
    save_file(recorded, folder / "golden.safetensors")
    (folder / "prompts.json").write_text(json.dumps(prompts) + "\n")


def record(
    base: Path, folder: Path, config: BnConfig, prompts: dict[str, list[int]], strength: float = 1.0
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Save an adapter, and return what the library computes with it: the first seed without near ties.

    {prompt: (tokens, logits)}. One that is weaker than the base is saved in half precision.
    """
    family, name = folder.parent.name, folder.name
    pickled = family == "llama" and name in PICKLED
    for seed in count(zlib.crc32(name.encode())):
        shutil.rmtree(folder, ignore_errors=True)
        model = load(base, family)
        adapters.init(model)
        model.add_adapter(NAME, config=config)
        randomise(model, seed, strength)
        save(model, folder, pickled=pickled)
        if name == "legacy":
            make_legacy(folder)
        if strength < 1:
            halve(folder)
        model = load(base, family)  # what counts is what the library reads from the files
        adapters.init(model)
        report: dict[str, Any] = {}
        model.load_adapter(str(folder), set_active=True, use_safetensors=not pickled, loading_info=report)
        if any(report.values()):
            raise SystemExit(f"the library read {name} of {family} incompletely: {report}")
        model.eval()
        found = {prompt: greedy(model, ids) for prompt, ids in prompts.items()}
        best = torch.cat([logits for _, logits in found.values()]).topk(2).values
        if (best[:, 0] - best[:, 1]).min() > MARGIN:
            break
    return found


def chosen(family: str) -> Iterator[tuple[str, BnConfig]]:
    yield from FORMS.items()
    for name, config in VARIATIONS.items():
        if family == "llama" or name in ELSEWHERE[family]:
            yield name, config


def make_base(family: str, folder: Path) -> None:
    name, shape = FAMILIES[family]
    config = getattr(transformers, name)(
        vocab_size=VOCABULARY,
        initializer_range=INIT,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=None,
        **shape,
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for weight in model.parameters():  # biases and norms as well: zeros and ones hide mistakes
            if weight.dim() == 1:
                weight.add_(torch.randn_like(weight) * 0.2)
    model.half().save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)


def load(folder: Path, name: str) -> Any:
    config = transformers.AutoConfig.from_pretrained(folder)
    if rotary := getattr(config, "rope_parameters", None):  # a newer transformers' name, unknown to this one
        config.rope_theta = rotary["rope_theta"]
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, config=config, dtype=torch.float32, attn_implementation="eager"
    )
    model.config.name_or_path = name  # it goes into the files, and a path says where we work
    return model


def randomise(model: Any, seed: int, strength: float) -> None:
    """At 1, each share is about as large as the base's own, so that the greedy tokens are not the base's."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if f".{NAME}." not in name:
                continue
            if name.endswith("scaling"):
                weight.normal_(1, 0.5)
            elif weight.dim() == 1:
                weight.normal_(0, 0.3 * strength)
            else:
                weight.normal_(0, strength * weight.shape[1] ** -0.5)


def save(model: Any, folder: Path, *, pickled: bool) -> None:
    folder.mkdir(parents=True)
    model.save_adapter(str(folder), NAME, with_head=False, use_safetensors=not pickled)


def halve(folder: Path) -> None:
    (weights,) = folder.glob("*.safetensors")
    save_file({name: tensor.half() for name, tensor in load_file(weights).items()}, weights)


def make_legacy(folder: Path) -> None:
    """As version 1 wrote it: other names in the keys, no version, and `gelu` for what is now gelu_new."""
    (weights,) = [path for path in folder.iterdir() if path.suffix != ".json"]
    pickled = weights.suffix == ".bin"
    tensors = torch.load(weights, weights_only=True) if pickled else load_file(weights)
    for new, old in LEGACY_KEYS.items():
        tensors = {name.replace(new, old): tensor for name, tensor in tensors.items()}
    (torch.save if pickled else save_file)(tensors, weights)
    config = folder / "adapter_config.json"
    fields = json.loads(config.read_text())
    del fields["version"]
    fields["type"] = "text_task"
    fields["config"] |= {"non_linearity": "gelu", "attention_type": "sent-lvl-dynamic"}
    config.write_text(json.dumps(fields, indent=2, sort_keys=True))


@torch.inference_mode()
def greedy(model: Any, prompt: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """NEW tokens [NEW] and the logits [NEW, V] they came from, each from a pass over everything before."""
    ids, rows = list(prompt), []
    for _ in range(NEW):
        rows.append(model(torch.tensor([ids]), use_cache=False).logits[0, -1])
        ids.append(int(rows[-1].argmax()))
    return torch.tensor(ids[len(prompt) :]), torch.stack(rows)


if __name__ == "__main__":
    main()
