"""Uploads of prefix tuning: one tensor with the keys and values of virtual tokens in every layer.

PEFT saves [tokens, layers * 2 * kv_heads * head_dim]. An encoder (`prefix_projection`) is not saved.
"""

import msgspec

from server.adapters.formats.peft import typed_config
from server.adapters.formats.peft_configs import PrefixConfig
from server.adapters.sites import Base
from server.adapters.specs.interface import AdapterFiles
from server.adapters.specs.tensor_names import check_shapes
from server.adapters.specs.virtual_tokens import TENSOR, check_field, check_tokens
from server.errors import InvalidAdapter


class PrefixSpec(msgspec.Struct, frozen=True):
    tokens: int
    rank: int = 0
    base_copies: dict[str, str] = {}


class PrefixReader:
    name = "prefix"

    def parse(self, files: AdapterFiles, base: Base) -> PrefixSpec:
        config = typed_config(files.config, PrefixConfig)
        spec = PrefixSpec(config.num_virtual_tokens)
        check_tokens(files, base, spec.tokens)
        self._check_heads(config, files, base)
        check_shapes(self.shapes(spec, base), files.tensors)
        return spec

    def shapes(self, spec: PrefixSpec, base: Base) -> dict[str, tuple[int, ...]]:
        return {TENSOR: (spec.tokens, 2 * base.layers * base.kv_heads * base.head_dim)}

    def _check_heads(self, config: PrefixConfig, files: AdapterFiles, base: Base) -> None:
        """Keys and values of this base's heads: PEFT once saved as many as there are query heads."""
        width = base.kv_heads * base.head_dim
        old = 2 * base.layers * base.hidden_size
        if files.tensors[TENSOR].shape[1] == old != 2 * base.layers * width:
            raise InvalidAdapter(
                f"Tensor {TENSOR!r} has {base.hidden_size} values for each key, as older versions of PEFT "
                f"saved it; this base model has {base.kv_heads} key heads of {base.head_dim}: train it anew.",
                param=TENSOR,
            )
        check_field("num_layers", config.num_layers, base.layers)
        check_field("num_attention_heads", config.num_attention_heads, base.kv_heads)
        check_field("token_dim", config.token_dim, width)
