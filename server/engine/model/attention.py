"""The attention function that transformers calls for each layer."""

from collections.abc import Callable
from typing import Any

import torch

from server.engine.model.forward_context import ForwardContext
from server.errors import UnsupportedModel
from server.kernels.cpu.paged_attention import AttentionOptions

# Arguments of transformers' attention functions that do not change the result, each with a test of the values
# that do not. All other arguments must be None.
WITHOUT_EFFECT: dict[str, Callable[[Any], bool]] = {
    "dropout": lambda value: not value,
    "is_causal": bool,
    "output_attentions": lambda value: not value,
    "output_router_logits": lambda _: True,  # with the model's outputs
    "use_cache": lambda _: True,
    "position_ids": lambda _: True,  # what depends on positions has been done to q and k
    "cache_position": lambda _: True,
}


def attend(
    module: Any,
    query: torch.Tensor,  # [1, heads, T, head_dim]
    key: torch.Tensor,  # [1, kv_heads, T, head_dim]
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """The attention function that transformers calls for each layer: [1, T, heads, head_dim].

    Raises UnsupportedModel if the layer asks for anything that is not implemented.
    """
    step: ForwardContext = module.polypeft_step
    layer: int = module.layer_idx
    attention_options = read_attention_options(module, step, query, attention_mask, options)
    q, k, v = query[0].transpose(0, 1), key[0].transpose(0, 1), value[0].transpose(0, 1)
    heads, dim = step.pages.values[layer].shape[1::2]
    if not k.shape == v.shape == (len(q), heads, dim) or q.shape[2] != dim or q.shape[1] % heads:
        raise UnsupportedModel(
            f"layer {layer} has {k.shape[1]} key heads of {k.shape[2]} and values of {v.shape[2]} numbers, "
            f"where its config says {heads} of {dim}"
        )
    if layer in step.attended:
        raise UnsupportedModel(f"its layer {layer} attends more than once a step")
    step.attended.add(layer)
    return step.attention(layer, q, k, v, attention_options)[None], None


def read_attention_options(
    module: Any, step: ForwardContext, query: torch.Tensor, mask: torch.Tensor | None, options: dict[str, Any]
) -> AttentionOptions:
    """The options of a layer's call; also recorded in `step.attention_options`.

    Raises UnsupportedModel if the layer asks for anything else.
    """
    known = {name: options.pop(name, None) for name in ("scaling", "sliding_window", "softcap")}
    if mask is not None:
        options["attention_mask"] = mask
    for name, value in options.items():
        if value is not None and not WITHOUT_EFFECT.get(name, lambda _: False)(value):
            raise UnsupportedModel(f"its attention uses {name}, which is not implemented")
    scale = query.shape[-1] ** -0.5 if known["scaling"] is None else known["scaling"]
    attention_options = AttentionOptions(scale, known["sliding_window"] or 0, known["softcap"] or 0.0)
    step.attention_options[module.layer_idx] = attention_options
    return attention_options
