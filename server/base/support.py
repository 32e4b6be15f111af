"""Whether the engine can serve the model in a folder. Reads no weights, runs no code of the folder.

Served: any decoder-only causal LM class of transformers that attends through AttentionInterface. Tested:
Llama (SmolLM2), GPT-2, Qwen2, Qwen3, Mistral, Gemma2. The rest is refused here, at start, by name and reason.
"""

import inspect
import json
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from server.errors import StartupError

_LAYER_TYPES = {"full_attention", "sliding_attention"}  # others keep state of another kind than K and V
_REFUSED_WHEN_SET = {
    "is_encoder_decoder": "it is an encoder-decoder, and only decoder-only models are served",
    "quantization_config": "its weights are quantized, and adapters need the plain ones",
    "scale_attn_by_inverse_layer_idx": "scale_attn_by_inverse_layer_idx is not implemented",
    "reorder_and_upcast_attn": "reorder_and_upcast_attn is not implemented",
    "kv_lora_rank": "its attention keeps latents instead of K and V",
    "num_kv_shared_layers": "its layers share K and V",
    "alibi": "its attention adds ALiBi biases",
}


def check_architecture(model_dir: Path) -> None:
    """Raises StartupError, naming the architecture and the reason, if the engine cannot serve this folder."""
    fields = _read_config(model_dir)
    name = str((fields.get("architectures") or [fields.get("model_type") or "unknown"])[0])
    reason = _reason_against(model_dir, fields)
    if reason:
        raise StartupError(f"The architecture {name} cannot be served: {reason}.", param="model")


def _read_config(model_dir: Path) -> dict[str, Any]:
    try:
        fields = json.loads((model_dir / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise StartupError(f"The model folder {model_dir.name!r} has no readable config.json.") from error
    if not isinstance(fields, dict):
        raise StartupError(f"The config.json of model folder {model_dir.name!r} is not a JSON object.")
    return fields


def _reason_against(model_dir: Path, fields: dict[str, Any]) -> str | None:
    """Why not, cheapest question first; None if it can be served."""
    if fields.get("model_type") not in CONFIG_MAPPING:
        return "this transformers does not know it, and code that comes with a model is never run"
    if any(
        key.endswith("_config") and key in fields for key in ("text_config", "vision_config", "audio_config")
    ):
        return "it is multimodal, and only text models are served"
    for field, reason in _REFUSED_WHEN_SET.items():
        if fields.get(field):
            return reason
    config = AutoConfig.from_pretrained(model_dir, local_files_only=True, trust_remote_code=False)
    if config.is_encoder_decoder:
        return _REFUSED_WHEN_SET["is_encoder_decoder"]
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return "transformers has no causal language model of this type"
    other = set(getattr(config, "layer_types", None) or ()) - _LAYER_TYPES
    if other:
        return f"it has layers of type {', '.join(sorted(other))}"
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    if "ALL_ATTENTION_FUNCTIONS.get_interface" not in inspect.getsource(sys.modules[model_class.__module__]):
        return "its class does not attend through transformers' AttentionInterface"
    if not any(model_dir.glob("*.safetensors")):
        return "its folder holds no .safetensors file, and pickled weights are never read"
    return _reason_in_modules(config)


def _reason_in_modules(config: Any) -> str | None:
    """What only the built model shows; on the meta device it costs no memory."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    for name, module in model.named_modules():
        if getattr(module, "is_causal", True) is False:
            return f"its attention {name} looks at later tokens"
    for name, parameter in model.named_parameters():
        if parameter.ndim > 2:
            return f"{name} has {parameter.ndim} dimensions (a mixture of experts, or a recurrent layer)"
    return None
