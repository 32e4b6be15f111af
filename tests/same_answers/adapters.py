"""Adapters of every kind for the default model, as small as they can be: one module, rank or width 1.

Their numbers are few and exact in float16, so that the files compress well and are the same everywhere.
"""

import json
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save

Array = npt.NDArray[np.float32]
Files = dict[str, bytes]  # by the files' names, as save_pretrained writes them

HIDDEN, INNER, LAYERS, KV = 576, 1536, 30, 192  # of SmolLM2-135M
LAST = f"model.layers.{LAYERS - 1}"
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def lora(seed: int, scale: float = 1.0, **config: Any) -> Files:
    """Rank 1 on the last layer's down projection."""
    at = f"base_model.model.{LAST}.mlp.down_proj"
    tensors = {
        f"{at}.lora_A.weight": _numbers(seed, 1, INNER),
        f"{at}.lora_B.weight": scale * _numbers(seed + 1, HIDDEN, 1),
    }
    given = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 1, "lora_alpha": 1}
    return _files(given | {"target_modules": [f"{LAST}.mlp.down_proj"]} | config, tensors)


def bottleneck(seed: int, scale: float = 1.0) -> Files:
    """AdapterHub's seq_bn (Pfeiffer) of width 1, behind the last layer alone."""
    at = f"{LAST}.output_adapters.adapters.tuned"
    tensors = {
        f"{at}.adapter_down.0.weight": _numbers(seed, 1, HIDDEN),
        f"{at}.adapter_down.0.bias": _numbers(seed + 1, 1),
        f"{at}.adapter_up.weight": scale * _numbers(seed + 2, HIDDEN, 1),
        f"{at}.adapter_up.bias": scale * _numbers(seed + 3, HIDDEN),
    }
    inner = {
        "mh_adapter": False,
        "output_adapter": True,
        "non_linearity": "relu",
        "original_ln_before": True,
        "original_ln_after": True,
        "residual_before_ln": True,
        "reduction_factor": HIDDEN,
        "leave_out": list(range(LAYERS - 1)),
        "scaling": 1.0,
    }
    config = {"config": inner, "model_type": "llama", "name": "tuned", "version": "adapters.1.3.0"}
    return _files(config, tensors, "adapter.safetensors")


def prefix(seed: int, scale: float = 1.0) -> Files:
    """One virtual token's keys and values in every layer."""
    config = {"peft_type": "PREFIX_TUNING", "task_type": "CAUSAL_LM", "num_virtual_tokens": 1}
    return _files(config, {"prompt_embeddings": scale * _numbers(seed, 1, LAYERS * 2 * KV)})


def prompt(seed: int, scale: float = 1.0) -> Files:
    """One virtual token's embedding."""
    config = {"peft_type": "PROMPT_TUNING", "task_type": "CAUSAL_LM", "num_virtual_tokens": 1}
    return _files(config, {"prompt_embeddings": scale * _numbers(seed, 1, HIDDEN)})


def bitfit(seed: int, scale: float = 1.0) -> Files:
    """A bias for the last layer's down projection, which has none."""
    tensors = {f"base_model.model.{LAST}.mlp.down_proj.bias": scale * _numbers(seed, HIDDEN)}
    return _files({"peft_type": "BITFIT", "task_type": "CAUSAL_LM", "bias_mode": "absolute"}, tensors)


def form(files: Files) -> list[tuple[str, tuple[str, bytes]]]:
    """Multipart parts of an upload."""
    return [("files", (name, content)) for name, content in sorted(files.items())]


def _numbers(seed: int, *shape: int) -> Array:
    """-1, -0.5, 0, 0.5 or 1 each."""
    drawn = np.random.default_rng(seed).integers(-2, 3, size=shape)
    return (drawn / 2).astype(np.float32)


def _files(config: dict[str, Any], tensors: dict[str, Array], weights: str = WEIGHTS) -> Files:
    return {CONFIG: json.dumps(config).encode(), weights: save(tensors)}
