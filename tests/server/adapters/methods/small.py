"""Two small models as the methods see them, and adapters for them as files."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from server.adapters.formats.peft import read_config
from server.adapters.formats.safetensors import TensorInfo, read_header
from server.adapters.methods.interface import Method
from server.adapters.sites import Base, Site
from server.adapters.specs.interface import AdapterFiles

HIDDEN, WORDS = 16, 50


def llama() -> Any:
    shape = {"hidden_size": HIDDEN, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": WORDS}
    return LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=4, num_key_value_heads=2))


def gpt2() -> Any:
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    return GPT2LMHeadModel(
        GPT2Config(n_embd=HIDDEN, n_layer=2, n_head=4, vocab_size=WORDS, n_positions=32, **ends)
    )


def site_of(name: str, module: torch.nn.Module) -> Site | None:
    match module:
        case torch.nn.Linear():
            return Site(name, "linear", module.in_features, module.out_features, module.bias is not None)
        case Conv1D():
            return Site(name, "linear", module.nx, module.nf, bias=True, conv1d=True)
        case torch.nn.Embedding():
            return Site(name, "embedding", module.num_embeddings, module.embedding_dim, bias=False)
        case torch.nn.LayerNorm():
            return Site(name, "norm", HIDDEN, HIDDEN, bias=True)
    return Site(name, "norm", HIDDEN, HIDDEN, bias=False) if name.endswith("norm") else None


def base_of(model: Any) -> Base:
    found = (site_of(name, module) for name, module in model.named_modules())
    sites = {site.name: site for site in found if site is not None}
    return Base("b", model.config.model_type, "0" * 64, 2, HIDDEN, 2, 4, WORDS, 32, sites)


def reshaped(info: TensorInfo, *shape: int) -> TensorInfo:
    return TensorInfo(info.dtype, shape, info.begin, info.end)


def weights_of(model: Any) -> dict[str, torch.Tensor]:
    """The base's weights as methods are given them: [out, in] by site, biases at "SITE.bias"."""
    weights = {}
    for name, module in model.named_modules():
        if isinstance(getattr(module, "weight", None), torch.nn.Parameter):
            weight = module.weight.detach().clone()
            weights[name] = weight.T.contiguous() if isinstance(module, Conv1D) else weight
            if getattr(module, "bias", None) is not None:
                weights[f"{name}.bias"] = module.bias.detach().clone()
    return weights


def read(folder: Path) -> AdapterFiles:
    """What an upload of this folder comes down to."""
    path = folder / "adapter_model.safetensors"
    with path.open("rb") as file:
        header = read_header(file, path.stat().st_size, max_header_bytes=1 << 20, max_tensors=1000)
    return AdapterFiles(read_config((folder / "adapter_config.json").read_bytes()), header)


def changed(files: AdapterFiles, tensors: dict[str, TensorInfo] | None = None, **config: Any) -> AdapterFiles:
    return AdapterFiles(files.config | config, files.tensors if tensors is None else tensors)


def started(
    method: Method, folder: Path, base: Base, out: Path, weights: Mapping[str, torch.Tensor] | None = None
) -> Path:
    """The adapter that training would begin with instead of this one, saved in the same format."""
    files = read(folder)
    spec = method.parse(files, base)
    tensors = method.init(spec, base, weights or {}, torch.Generator().manual_seed(1))
    again = method.init(spec, base, weights or {}, torch.Generator().manual_seed(1))
    assert all(torch.equal(tensors[name], again[name]) for name in tensors)
    out.mkdir()
    (out / "adapter_config.json").write_text(json.dumps(files.config))
    save_file(tensors, out / "adapter_model.safetensors", {"format": "pt"})
    assert method.parse(read(out), base) == spec
    assert method.shapes(spec, base) == {name: info.shape for name, info in read(out).tensors.items()}
    return out
