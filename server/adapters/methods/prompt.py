"""Prompt tuning and P-tuning: embeddings of virtual tokens, which the model computes like a prompt's own.

(arXiv 2104.08691, 2103.10385.) They enter as the saved values, never scaled as Gemma scales its own.
"""

from collections.abc import Mapping

import torch

from server.adapters.methods.flat_buffer import flatten
from server.adapters.methods.interface import Bank, Packed, RecordedSites, Tensors
from server.adapters.methods.token_spans import TokenSpans
from server.adapters.sites import Base, Site
from server.adapters.specs.prompt import PromptReader, PromptSpec
from server.adapters.specs.virtual_tokens import TENSOR


class PromptBank(Bank):
    """Embeddings by slot, put in the place of negative token ids: -1 is an adapter's first."""

    leads = True

    def __init__(self, base: Base, slots: int, device: torch.device, dtype: torch.dtype) -> None:  # noqa: ARG002 - as Bank
        self.device = device
        self.embeddings: list[torch.Tensor | None] = [None] * (slots + 1)

    def put(self, slot: int, packed: Packed) -> None:
        self.embeddings[slot] = packed.flat.to(self.device, non_blocking=True).view(packed.layout)

    def clear(self, slot: int) -> None:
        self.embeddings[slot] = None

    def affine(
        self,
        site: Site,
        x: torch.Tensor,
        y: torch.Tensor,
        rows: TokenSpans,
        bias: torch.Tensor | None,  # noqa: ARG002 - as Bank
    ) -> None:
        if site.kind != "embedding":
            return
        for slot, start, end, _ in rows.spans:
            embeddings, ids = self.embeddings[slot], x[start:end, None]
            if embeddings is not None:  # no index that the host would have to wait for
                own = embeddings[(-1 - ids[:, 0]).clamp(0, embeddings.shape[0] - 1)]
                y[start:end] = torch.where(ids < 0, own, y[start:end])

    def trace(self, slot: int) -> RecordedSites | None:  # noqa: ARG002 - as Bank
        return RecordedSites()


class Prompt(PromptReader):
    bank = PromptBank

    def init(
        self,
        spec: PromptSpec,
        base: Base,
        weights: Mapping[str, torch.Tensor],  # noqa: ARG002 - as Method
        rng: torch.Generator,
    ) -> Tensors:
        """As PEFT starts: normal. A text's own embeddings are a better start."""
        return {TENSOR: torch.randn(self.shapes(spec, base)[TENSOR], generator=rng)}

    def pack(
        self,
        spec: PromptSpec,
        base: Base,
        tensors: Tensors,
        weights: Mapping[str, torch.Tensor],  # noqa: ARG002 - as Method
        dtype: torch.dtype,
    ) -> Packed:
        shape = self.shapes(spec, base)[TENSOR]
        return Packed(flatten([tensors[TENSOR]], dtype), shape, virtual_tokens=spec.tokens)
