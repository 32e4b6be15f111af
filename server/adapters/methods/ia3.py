"""IA3 scales the outputs of linears, and of feed-forward modules the inputs (arXiv 2205.05638).

Scaling an output l * (W x + b) is affine at its site: gain l - 1 upon W x, and (l - 1) * b added.
"""

from collections.abc import Mapping

import torch

from server.adapters.methods.affine_bank import AffineBank, pack_deltas
from server.adapters.methods.affine_layout import AffineDelta
from server.adapters.methods.interface import Packed, RecordedSites, Tensors
from server.adapters.methods.token_spans import TokenSpans
from server.adapters.sites import Base, Site
from server.adapters.specs.ia3 import Ia3Reader, Ia3Spec


class Ia3Bank(AffineBank):
    """An affine bank that also scales inputs. Separate, so that rows of other methods do not pay for that."""

    def inputs(self, site: Site, x: torch.Tensor, rows: TokenSpans) -> torch.Tensor:
        """x [T, in] with the tokens of input-scaling adapters scaled, in a copy."""
        scaled = rows.gather(lambda slot: self._scale(slot, site.name))
        if scaled is None:
            return x
        rows.check_count(len(x))
        tokens, scales = scaled  # [n], [n, in]
        x = x.clone()
        x[tokens] *= scales
        return x

    def recorded_sites(self, slot: int) -> RecordedSites | None:
        """None for an adapter that scales inputs: its tokens are found on the host, during the step."""
        loaded = self.loaded[slot]
        scales = loaded and any(piece.part == "scale" for piece in loaded.layout.pieces)
        return None if scales else super().recorded_sites(slot)

    def _scale(self, slot: int, site: str) -> torch.Tensor | None:
        delta = self.delta(slot, site)
        return None if delta is None else delta.scale


class Ia3(Ia3Reader):
    bank = Ia3Bank

    def init(
        self,
        spec: Ia3Spec,
        base: Base,
        weights: Mapping[str, torch.Tensor],  # noqa: ARG002 - as Method
        rng: torch.Generator,  # noqa: ARG002 - as Method
    ) -> Tensors:
        """As in PEFT: ones."""
        return {
            tensor: torch.ones(shape)
            for tensor, shape in self.shapes(spec, base).items()
            if tensor not in spec.base_copies
        }

    def pack(
        self,
        spec: Ia3Spec,
        base: Base,
        tensors: Tensors,
        weights: Mapping[str, torch.Tensor],
        dtype: torch.dtype,
    ) -> Packed:
        """One AffineDelta for each site: a gain and bias [out], or a scale [in]."""
        deltas = [
            AffineDelta(site, scale=tensors[tensor].float().flatten()) for site, tensor in spec.inputs.items()
        ]
        for site, tensor in spec.outputs.items():
            gain = tensors[tensor].float().flatten() - 1
            bias = gain * weights[f"{site}.bias"].float() if base.sites[site].bias else None
            deltas.append(AffineDelta(site, gain=gain, bias=bias))
        return pack_deltas(deltas, dtype)
