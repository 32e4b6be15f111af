"""LN_TUNING: norms with other weights and biases (arXiv 2312.11420). affine_bank.py computes them."""

from collections.abc import Mapping

import torch

from server.adapters.methods.affine_bank import AffineBank, pack_deltas
from server.adapters.methods.interface import Packed, Tensors
from server.adapters.methods.norm_deltas import norm_deltas
from server.adapters.sites import Base
from server.adapters.specs.ln_tuning import LnTuningReader, LnTuningSpec
from server.errors import InvalidAdapter


class LnTuning(LnTuningReader):
    bank = AffineBank

    def init(
        self,
        spec: LnTuningSpec,  # noqa: ARG002 - as Method
        base: Base,  # noqa: ARG002 - as Method
        weights: Mapping[str, torch.Tensor],  # noqa: ARG002 - as Method
        rng: torch.Generator,  # noqa: ARG002 - as Method
    ) -> Tensors:
        """Raises InvalidAdapter: the method is not trained here."""
        raise InvalidAdapter("LN_TUNING is served, but not trained here.", param="method")

    def pack(
        self,
        spec: LnTuningSpec,
        base: Base,  # noqa: ARG002 - as Method
        tensors: Tensors,
        weights: Mapping[str, torch.Tensor],  # noqa: ARG002 - as Method
        dtype: torch.dtype,
    ) -> Packed:
        """One AffineDelta with `norm` for each site."""
        return pack_deltas(norm_deltas(spec.norms, tensors), dtype)
