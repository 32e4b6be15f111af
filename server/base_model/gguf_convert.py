"""`python -m server.base_model.gguf_convert GGUF TARGET`: a GGUF file to a safetensors folder with tokenizer.

A program of its own because it holds two copies of the weights.
"""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

# fields of the loaded config that describe the GGUF file, not the folder that is written
_GGUF_FIELDS = ("quantization_config", "_name_or_path")


def convert(gguf: Path, target: Path) -> None:
    """Write config, generation config, float32 weights, tokenizer and chat template to `target`.

    The loader's own model refuses save_pretrained because it counts as quantized; a fresh model of the same
    class and config takes its weights instead.
    """
    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name, "local_files_only": True}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    loaded = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    fields = {key: value for key, value in loaded.config.to_dict().items() if key not in _GGUF_FIELDS}
    plain = type(loaded)(type(loaded.config)(**fields))
    plain.load_state_dict(loaded.state_dict())
    plain.save_pretrained(target)
    tokenizer.save_pretrained(target)


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
