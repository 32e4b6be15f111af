"""AdapterHub's adapter_interface.json: where in a model without built-in support its hooks sit.

The library saves it beside such a model's adapters. A tenant may have written one of their own, and then the
same tensors compute something else: it is read only to see that it says what the engine does.
"""

from typing import Any

from server.adapters.formats.strict_json import strict_json
from server.errors import InvalidAdapter, shown

FILE = "adapter_interface.json"
MAX_BYTES = 64 << 10

# What decides: the module whose output an adapter changes, the norm whose input is the residual, and the
# norm that the library puts before an adapter.
PRE_NORM = {
    "layer_self_attn": "self_attn",
    "attn_o_proj": "o_proj",
    "layer_output_proj": "mlp.down_proj",
    "layer_pre_self_attn": "input_layernorm",
    "layer_pre_ffn": "post_attention_layernorm",
    "layer_ln_1": None,
    "layer_ln_2": None,
}
SANDWICHED = PRE_NORM | {
    "layer_pre_ffn": "pre_feedforward_layernorm",
    "layer_ln_1": "post_attention_layernorm",
    "layer_ln_2": "post_feedforward_layernorm",
}
EXPECTED = {"gemma2": SANDWICHED, "gemma3_text": SANDWICHED}


def check_interface(data: bytes, model_type: str) -> None:
    """Raises InvalidAdapter, by the field, if an adapter trained under it is not what the engine serves."""
    file = strict_json(data, FILE, MAX_BYTES)
    interface: Any = file.get("interface")
    if file.get("model_type") != model_type or not isinstance(interface, dict):
        raise InvalidAdapter(f"{FILE} is not one for a {model_type}.", param=FILE)
    for field, expected in EXPECTED.get(model_type, PRE_NORM).items():
        found = interface.get(field)
        if found != expected:
            raise InvalidAdapter(
                f"{FILE} has {field} {shown(found)}; for a {model_type} it must be {shown(expected)}.",
                param=field,
            )
