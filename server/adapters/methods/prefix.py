"""Prefix tuning: keys and values of virtual tokens, put before a row in every layer (arXiv 2101.00190).

They are saved as [tokens, layers * 2 * kv_heads * head_dim], each layer's keys before its values, and go into
the KV cache as they are: no rotary embedding, no key norm.
"""

from collections.abc import Mapping

import torch

from server.adapters.methods.flat_buffer import flatten
from server.adapters.methods.interface import Bank, Packed, RecordedSites, Start, Tensors
from server.adapters.sites import Base
from server.adapters.specs.prefix import PrefixReader, PrefixSpec
from server.adapters.specs.virtual_tokens import TENSOR


class PrefixBank(Bank):
    """Keys and values by slot; the engine copies them into the KV cache when a row starts."""

    def __init__(self, base: Base, slots: int, device: torch.device, dtype: torch.dtype) -> None:  # noqa: ARG002 - as Bank
        self.device = device
        self.starts: list[Start | None] = [None] * (slots + 1)

    def put(self, slot: int, packed: Packed) -> None:
        keys, values = packed.flat.to(self.device, non_blocking=True).view(packed.layout)
        self.starts[slot] = Start(keys, values)

    def clear(self, slot: int) -> None:
        self.starts[slot] = None

    def recorded_sites(self, slot: int) -> RecordedSites | None:  # noqa: ARG002 - as Bank
        return RecordedSites()

    def start(self, slot: int) -> Start | None:
        return self.starts[slot]


class Prefix(PrefixReader):
    bank = PrefixBank

    def init(
        self,
        spec: PrefixSpec,
        base: Base,
        weights: Mapping[str, torch.Tensor],  # noqa: ARG002 - as Method
        rng: torch.Generator,
    ) -> Tensors:
        """As in PEFT: normal. Keys and values of a text are better initial values (adapter_model.py)."""
        return {TENSOR: torch.randn(self.shapes(spec, base)[TENSOR], generator=rng)}

    def pack(
        self,
        spec: PrefixSpec,
        base: Base,
        tensors: Tensors,
        weights: Mapping[str, torch.Tensor],  # noqa: ARG002 - as Method
        dtype: torch.dtype,
    ) -> Packed:
        """Keys, then values, [2, layers, tokens, kv_heads, head_dim]."""
        saved = tensors[TENSOR].view(spec.tokens, base.layers, 2, base.kv_heads, base.head_dim)
        keys_values = saved.permute(2, 1, 0, 3, 4)
        return Packed(
            flatten([keys_values], dtype), keys_values.shape, virtual_tokens=spec.tokens, kv_precomputed=True
        )
