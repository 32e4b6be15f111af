"""`python -m server.engine.model.config_shapes FOLDER`: a model's Shapes as JSON, from its config.json alone.

A program of its own, because it needs torch and transformers and the CLI that calls it (`size`) does not. The
model is built as the engine builds it, but its weights take no memory.
"""

import sys
from pathlib import Path
from typing import Any

import msgspec
from accelerate import init_empty_weights
from transformers import AutoConfig, AutoModelForCausalLM

from server.engine.model.base_model import describe_base
from server.engine.model.forward_context import ForwardContext
from server.engine.model.linear_sites import replace_modules
from server.engine.model.memory_estimate import ITEM_BYTES, Shapes
from server.engine.model.module_kinds import kind_of
from server.engine.model.module_tokens import SeenTokens
from server.engine.model.rotary import longest_context
from server.kernels.weight_formats import FLOAT32


def read_shapes(folder: Path) -> Shapes:
    """The Shapes of the model in `folder`.

    Raises what transformers raises for a config.json that it cannot build a model from.
    """
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    with init_empty_weights():  # buffers take memory: Gemma's sites read one
        model: Any = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    model.tie_weights()
    weights = sum(parameter.numel() for parameter in model.parameters())  # each shared one once
    head = model.get_output_embeddings()
    tied = head is not None and head.weight is model.get_input_embeddings().weight
    names = {module: name for name, module in model.named_modules()}
    head_name = names.get(head, "")
    seen: dict[str, SeenTokens] = {name: "all" for name, module in model.named_modules() if kind_of(module)}
    modules, _ = replace_modules(model, seen, ForwardContext())
    sites = {name: module.site for name, module in modules.items()}
    packed = weights
    for site in sites.values():
        if site.kind == "linear" and FLOAT32.available:
            replaced = 0 if tied and site.name == head_name else site.outputs * site.inputs
            packed_bytes = FLOAT32.linear.packed_bytes(site.outputs, site.inputs)
            packed += packed_bytes // ITEM_BYTES["float32"] - replaced
    return Shapes(
        describe_base(config, folder.name, sites, "", longest_context(model)), head_name, weights, packed
    )


def main() -> None:
    sys.stdout.buffer.write(msgspec.json.encode(read_shapes(Path(sys.argv[1]))) + b"\n")


if __name__ == "__main__":
    main()
