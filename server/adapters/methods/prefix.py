"""Prefix tuning: keys and values of virtual tokens, put before a row in every layer (arXiv 2101.00190).

PEFT saves them flat, [tokens, layers * 2 * kv_heads * head_dim], each layer's keys before its values, as
they go into the cache: no rotary embedding, no key norm. An encoder (`prefix_projection`) is not saved.
"""

from collections.abc import Mapping

import msgspec
import torch

from server.adapters.formats.peft import typed_config
from server.adapters.formats.peft_configs import PrefixConfig
from server.adapters.methods.interface import AdapterFiles, Bank, Packed, RecordedSites, Start, Tensors
from server.adapters.methods.tensor_names import check_shapes, flatten
from server.adapters.methods.virtual_tokens import TENSOR, check_field, check_tokens
from server.adapters.sites import Base
from server.errors import InvalidAdapter


class PrefixSpec(msgspec.Struct, frozen=True):
    tokens: int
    rank: int = 0
    base_copies: dict[str, str] = {}


class PrefixBank(Bank):
    """Keys and values by slot, for the engine to copy into the pages of rows that begin."""

    def __init__(self, base: Base, slots: int, device: torch.device, dtype: torch.dtype) -> None:  # noqa: ARG002 - as Bank
        self.device = device
        self.starts: list[Start | None] = [None] * (slots + 1)

    def put(self, slot: int, packed: Packed) -> None:
        keys, values = packed.flat.to(self.device, non_blocking=True).view(packed.layout)
        self.starts[slot] = Start(keys, values)

    def clear(self, slot: int) -> None:
        self.starts[slot] = None

    def trace(self, slot: int) -> RecordedSites | None:  # noqa: ARG002 - as Bank
        return RecordedSites()

    def start(self, slot: int) -> Start | None:
        return self.starts[slot]


class Prefix:
    name = "prefix"
    bank = PrefixBank

    def parse(self, files: AdapterFiles, base: Base) -> PrefixSpec:
        config = typed_config(files.config, PrefixConfig)
        spec = PrefixSpec(config.num_virtual_tokens)
        check_tokens(files, base, spec.tokens)
        self._check_heads(config, files, base)
        check_shapes(self.shapes(spec, base), files.tensors)
        return spec

    def shapes(self, spec: PrefixSpec, base: Base) -> dict[str, tuple[int, ...]]:
        return {TENSOR: (spec.tokens, 2 * base.layers * base.kv_heads * base.head_dim)}

    def init(
        self,
        spec: PrefixSpec,
        base: Base,
        weights: Mapping[str, torch.Tensor],  # noqa: ARG002 - as Method
        rng: torch.Generator,
    ) -> Tensors:
        """As PEFT starts: normal. A text's own keys and values are a better start."""
        return {TENSOR: torch.randn(self.shapes(spec, base)[TENSOR], generator=rng)}

    def pack(
        self,
        spec: PrefixSpec,
        base: Base,
        tensors: Tensors,
        weights: Mapping[str, torch.Tensor],  # noqa: ARG002 - as Method
        dtype: torch.dtype,
    ) -> Packed:
        saved = tensors[TENSOR].view(spec.tokens, base.layers, 2, base.kv_heads, base.head_dim)
        both = saved.permute(2, 1, 0, 3, 4)  # [keys and values, layers, tokens, kv_heads, head_dim]
        return Packed(flatten([both], dtype), both.shape, virtual=spec.tokens, given=True)

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
