"""Whether the engine can serve the model in a folder. Reads no weights, runs no code of the folder.

Served: any decoder-only causal LM class of transformers that attends through AttentionInterface. All others
are refused here, at start, with the reason. Whether the logits are right, the engine checks once the weights
are loaded (engine/model/exactness_check.py). docs/bases.md lists the families.
"""

import inspect
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from server.errors import StartupError, UnsupportedModel

MAX_REASON = 200  # characters of an error of transformers
_MULTIMODAL = ("text_config", "vision_config", "audio_config")
_SERVED_LAYERS = {"full_attention", "sliding_attention"}
_RECURRENT = "it has recurrent, convolutional or state-space layers"
_COMPRESSES = "its attention compresses what it has seen"
_REFUSED_LAYERS = {
    "chunked_attention": "its attention starts afresh with each chunk of the text",
    "compressed_sparse_attention": _COMPRESSES,
    "heavily_compressed_attention": _COMPRESSES,
    "indexed_attention": "its attention selects what it sees by an index",
    "linear_attention": _RECURRENT,
    "conv": _RECURRENT,
    "mamba": _RECURRENT,
    "recurrent": _RECURRENT,
    "hybrid": _RECURRENT,
}
_REFUSED_WHEN_SET = {
    "is_encoder_decoder": "it is an encoder-decoder, and only decoder-only models are served",
    "quantization_config": "its weights are quantized, and adapters need the plain ones",
    "scale_attn_by_inverse_layer_idx": "scale_attn_by_inverse_layer_idx is not implemented",
    "reorder_and_upcast_attn": "reorder_and_upcast_attn is not implemented",
    "kv_lora_rank": "its attention keeps latents instead of K and V",
    "num_kv_shared_layers": "its layers share K and V",
    "alibi": "its attention adds ALiBi biases",
}
# Sizes that the engine asks the config for, one number for all layers.
_SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")
_OPTIONAL_SIZES = ("num_key_value_heads", "head_dim")


def check_architecture(model_dir: Path) -> None:
    """Raises StartupError, naming the architecture and the reason, if the engine cannot serve this folder."""
    fields = _read_config(model_dir)
    try:
        _check(model_dir, fields)
    except UnsupportedModel as error:
        message = f"The architecture {_name_of(fields)} cannot be served: {error.message}."
        raise StartupError(message, param="model") from error


def _read_config(model_dir: Path) -> dict[str, Any]:
    try:
        fields = json.loads((model_dir / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise StartupError(f"The model folder {model_dir.name!r} has no readable config.json.") from error
    if not isinstance(fields, dict):
        raise StartupError(f"The config.json of model folder {model_dir.name!r} is not a JSON object.")
    return fields


def _name_of(fields: dict[str, Any]) -> str:
    architectures = fields.get("architectures")
    if isinstance(architectures, list) and architectures:
        return str(architectures[0])
    return str(fields.get("model_type") or "unknown")


def _check(model_dir: Path, fields: dict[str, Any]) -> None:
    """Raises UnsupportedModel with the reason. The cheapest checks come first."""
    model_type = fields.get("model_type")
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        raise UnsupportedModel(
            "this transformers does not know it, and code that comes with a model is never run"
        )
    with _refusing("transformers does not take its config.json", model_dir):
        config = AutoConfig.from_pretrained(model_dir, local_files_only=True, trust_remote_code=False)
    for field, reason in _REFUSED_WHEN_SET.items():
        if _field(config, field):
            raise UnsupportedModel(reason)
    if any(_field(config, field) is not None for field in _MULTIMODAL):
        raise UnsupportedModel("it is multimodal, and only text models are served")
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UnsupportedModel("transformers has no causal language model of this type")
    _check_layer_types(config)
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    if "ALL_ATTENTION_FUNCTIONS.get_interface" not in inspect.getsource(sys.modules[model_class.__module__]):
        raise UnsupportedModel("its class does not attend through transformers' AttentionInterface")
    if not any(model_dir.glob("*.safetensors")):
        raise UnsupportedModel("its folder holds no .safetensors file, and pickled weights are never read")
    _check_sizes(config)
    with _refusing("transformers cannot build it from its config.json", model_dir), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    _check_modules(model)


@contextmanager
def _refusing(what: str, model_dir: Path) -> Iterator[None]:
    """Turn what transformers raises about a config into UnsupportedModel: its last line, without the path."""
    try:
        yield
    except Exception as error:
        said = repr(error) if isinstance(error, LookupError) else str(error).strip() or type(error).__name__
        said = said.replace(str(model_dir), model_dir.name).splitlines()[-1].strip()
        raise UnsupportedModel(f"{what} ({said[:MAX_REASON].rstrip('.')})") from error


def _check_layer_types(config: Any) -> None:
    others = sorted(set(getattr(config, "layer_types", None) or ()) - _SERVED_LAYERS)
    if others:
        kept = "its layers keep a state of another kind than K and V"
        reason = next((_REFUSED_LAYERS[kind] for kind in others if kind in _REFUSED_LAYERS), kept)
        raise UnsupportedModel(f"{reason} (layers of type {', '.join(others)})")


def _check_sizes(config: Any) -> None:
    for name in _SIZES + _OPTIONAL_SIZES:
        value = _field(config, name)
        if value is None and name in _OPTIONAL_SIZES:
            continue
        if not isinstance(value, int) or value < 1:
            raise UnsupportedModel(f"its config gives no {name}")


def _field(config: Any, name: str) -> Any:
    """The config's field; None if it has none. Raises UnsupportedModel if layers differ in it."""
    try:
        return getattr(config, name, None)
    except RuntimeError as error:
        raise UnsupportedModel(f"its layers differ in {name}") from error


def _check_modules(model: nn.Module) -> None:
    """Check the model as built on the meta device, where it takes no memory. Raises UnsupportedModel."""
    for name, module in model.named_modules():
        if getattr(module, "is_causal", True) is False:
            raise UnsupportedModel(f"its attention {name} looks at later tokens")
        if hasattr(module, "create_position_ids_from_input_ids"):  # RoBERTa and its kin
            raise UnsupportedModel("it counts positions from its padding token on")
        if type(module).__name__.endswith("Experts"):
            raise UnsupportedModel("it is a mixture of experts")
    for name, parameter in model.named_parameters():
        if parameter.ndim > 2:
            raise UnsupportedModel(f"its weight {name} has {parameter.ndim} dimensions, where 2 are served")
