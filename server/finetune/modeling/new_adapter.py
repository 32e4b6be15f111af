"""The config and tensor shapes of a new adapter, in its public format.

LoRA, prefix and prompt tuning have PEFT's format, bottlenecks AdapterHub's, BitFit our own. The method that
will serve the files parses the config, so training and serving agree on its meaning. A method that can be
trained is a function of _FORMATS here and a struct in recipe_methods.py, which names what else there is.
"""

import math
from dataclasses import dataclass
from typing import Any

import msgspec

from server.adapters.formats.safetensors import TensorInfo
from server.adapters.methods import build_methods
from server.adapters.methods.interface import Method
from server.adapters.sites import Base
from server.adapters.specs.bottleneck import PLACES
from server.adapters.specs.interface import AdapterFiles
from server.adapters.specs.tensor_names import PREFIX
from server.adapters.specs.virtual_tokens import TENSOR
from server.base_model.families import HEAD_NORMS
from server.finetune.recipe_methods import (
    BitfitRecipe,
    BottleneckRecipe,
    LoraRecipe,
    Peft,
    PrefixRecipe,
    PromptRecipe,
    layer_linears,
)

MAX_RANK = 1024  # the recipe's rank was checked against the server's limit before
ADAPTER_NAME = "tuned"  # AdapterHub's tensor names contain the adapter's
ADAPTER_MODULES = {kind: place for place, (kind, _field) in PLACES.items()}

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class NewAdapter:
    """The files and the spec of an adapter whose tensors are not initialised."""

    method: Method
    spec: Any  # of the method's own type
    config: dict[str, Any]  # adapter_config.json
    weights_file: str  # the file name of the format

    @property
    def num_virtual_tokens(self) -> int:
        """Virtual tokens before each sequence."""
        return self.spec.tokens if self.method.name in ("prefix", "prompt") else 0


def new_adapter(peft: Peft, base: Base) -> NewAdapter:
    """The adapter that a recipe describes. Raises InvalidAdapter if it does not fit this base."""
    config, shapes = _FORMATS[type(peft)](peft, base)
    name = msgspec.to_builtins(peft)["type"]
    method = build_methods(MAX_RANK)[name]
    tensors = {tensor: TensorInfo("F32", shape, 0, 4 * math.prod(shape)) for tensor, shape in shapes.items()}
    spec = method.parse(AdapterFiles(config, tensors), base)
    file = "adapter.safetensors" if name == "bottleneck" else "adapter_model.safetensors"
    return NewAdapter(method, spec, config, file)


def _lora(peft: LoraRecipe, base: Base) -> tuple[dict[str, Any], Shapes]:
    ends = tuple(f".{module}" for module in peft.target_modules)
    targets = [site for site in layer_linears(base) if f".{site.name}".endswith(ends)]
    shapes: Shapes = {}
    for site in targets:
        prefix = f"{PREFIX}{site.name}"
        shapes |= {
            f"{prefix}.lora_A.weight": (peft.r, site.inputs),
            f"{prefix}.lora_B.weight": (site.outputs, peft.r),
        }
        if peft.use_dora:
            shapes[f"{prefix}.lora_magnitude_vector"] = (site.outputs,)
    config = _peft("LORA", base) | {
        "r": peft.r,
        "lora_alpha": peft.lora_alpha,
        "lora_dropout": peft.lora_dropout,
        "target_modules": list(peft.target_modules),
        "use_rslora": peft.use_rslora,
        "use_dora": peft.use_dora,
        "fan_in_fan_out": any(site.conv1d for site in targets),
        "bias": "none",
    }
    return config, shapes


def _bottleneck(peft: BottleneckRecipe, base: Base) -> tuple[dict[str, Any], Shapes]:
    both = peft.placement == "double_seq_bn"
    parallel = peft.placement == "par_bn"
    hidden, width = base.hidden_size, max(1, int(base.hidden_size // peft.reduction_factor))
    shapes: Shapes = {}
    for site in base.sites.values():
        if site.kind == "mlp" or (both and site.kind == "attention"):
            prefix = f"{site.name.rpartition('.')[0]}.{ADAPTER_MODULES[site.kind]}.adapters.{ADAPTER_NAME}"
            shapes |= {
                f"{prefix}.adapter_down.0.weight": (width, hidden),
                f"{prefix}.adapter_down.0.bias": (width,),
            }
            shapes |= {f"{prefix}.adapter_up.weight": (hidden, width), f"{prefix}.adapter_up.bias": (hidden,)}
    inner: dict[str, Any] = {
        "mh_adapter": both,
        "output_adapter": True,
        "reduction_factor": peft.reduction_factor,
        "non_linearity": "swish" if peft.non_linearity == "silu" else peft.non_linearity,
        "original_ln_before": peft.placement == "seq_bn",
        "original_ln_after": True,
        "ln_before": False,
        "ln_after": False,
        "residual_before_ln": True,
        "adapter_residual_before_ln": False,
        "is_parallel": parallel,
        "init_weights": "mam_adapter" if parallel else "bert",
        "scaling": peft.scaling,
        "leave_out": [],
    }
    config = {
        "config": inner,
        "hidden_size": hidden,
        "model_type": base.model_type,
        "model_name": base.id,
        "name": ADAPTER_NAME,
        "version": "adapters.1.3.0",
    }
    return config, shapes


def _prefix(peft: PrefixRecipe, base: Base) -> tuple[dict[str, Any], Shapes]:
    width = base.kv_heads * base.head_dim
    config = _peft("PREFIX_TUNING", base) | {
        "num_virtual_tokens": peft.num_virtual_tokens,
        "num_layers": base.layers,
        "num_attention_heads": base.kv_heads,
        "token_dim": width,
        "num_transformer_submodules": 1,
        "prefix_projection": False,
    }
    return config, {TENSOR: (peft.num_virtual_tokens, 2 * base.layers * width)}


def _prompt(peft: PromptRecipe, base: Base) -> tuple[dict[str, Any], Shapes]:
    config = _peft("PROMPT_TUNING", base) | {
        "num_virtual_tokens": peft.num_virtual_tokens,
        "num_layers": base.layers,
        "token_dim": base.hidden_size,
        "num_transformer_submodules": 1,
    }
    return config, {TENSOR: (peft.num_virtual_tokens, base.hidden_size)}


def _bitfit(peft: BitfitRecipe, base: Base) -> tuple[dict[str, Any], Shapes]:
    linears = layer_linears(base) if peft.biases != "norm" else []
    norms = [site for site in base.sites.values() if site.kind == "norm" and peft.biases != "linear"]
    sites = [*linears, *(site for site in norms if not site.name.endswith(HEAD_NORMS))]
    config = _peft("BITFIT", base) | {"bias_mode": "delta"}
    return config, {f"{PREFIX}{site.name}.bias": (site.outputs,) for site in sites}


def _peft(kind: str, base: Base) -> dict[str, Any]:
    common = {"task_type": "CAUSAL_LM", "inference_mode": True}
    return {"peft_type": kind, "base_model_name_or_path": base.id} | common


_FORMATS: dict[type[Peft], Any] = {
    LoraRecipe: _lora,
    BottleneckRecipe: _bottleneck,
    PrefixRecipe: _prefix,
    PromptRecipe: _prompt,
    BitfitRecipe: _bitfit,
}
