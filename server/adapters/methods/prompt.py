"""Prompt tuning and P-tuning: embeddings of virtual tokens before each row (arXiv 2104.08691, 2103.10385).

They enter the first layer as saved: Gemma's scaling of embeddings does not apply to them.
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
    """Embeddings by slot, for tokens with negative ids: -1 is an adapter's first."""

    virtual_tokens_only = True

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
        """Replace the rows of y [T, hidden] whose ids x [T] are negative."""
        if site.kind != "embedding":
            return
        for slot, start, end, _ in rows.spans:
            embeddings, ids = self.embeddings[slot], x[start:end, None]
            if embeddings is not None:  # where() instead of a mask, for which the host would wait
                replaced = embeddings[(-1 - ids[:, 0]).clamp(0, embeddings.shape[0] - 1)]
                y[start:end] = torch.where(ids < 0, replaced, y[start:end])

    def recorded_sites(self, slot: int) -> RecordedSites | None:  # noqa: ARG002 - as Bank
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
        """As in PEFT: normal. Embeddings of a text are better initial values (adapter_model.py)."""
        return {TENSOR: torch.randn(self.shapes(spec, base)[TENSOR], generator=rng)}

    def pack(
        self,
        spec: PromptSpec,
        base: Base,
        tensors: Tensors,
        weights: Mapping[str, torch.Tensor],  # noqa: ARG002 - as Method
        dtype: torch.dtype,
    ) -> Packed:
        """[tokens, hidden]."""
        shape = self.shapes(spec, base)[TENSOR]
        return Packed(flatten([tensors[TENSOR]], dtype), shape, virtual_tokens=spec.tokens)
