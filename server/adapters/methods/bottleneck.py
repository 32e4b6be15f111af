"""Bottleneck adapters: h += scaling * (U act(D x + d) + u) after attention or MLP, as AdapterHub computes it.

Here are their initial values and the folding of scalings and norms; bottleneck_bank.py applies them.
"""

from collections.abc import Mapping

import torch

from server.adapters.methods.bottleneck_bank import BottleneckBank, BottleneckDelta, pack_deltas
from server.adapters.methods.interface import Packed, Tensors
from server.adapters.sites import Base
from server.adapters.specs.bottleneck import BottleneckReader, BottleneckSpec, BottleneckTarget

BERT_STD = 0.02  # of BERT's initial weights, which AdapterHub uses


class Bottleneck(BottleneckReader):
    bank = BottleneckBank

    def init(
        self,
        spec: BottleneckSpec,
        base: Base,
        weights: Mapping[str, torch.Tensor],  # noqa: ARG002 - as Method
        rng: torch.Generator,
    ) -> Tensors:
        """As in AdapterHub: normal D and U, or for parallel adapters Kaiming-uniform D and zero U."""
        tensors: Tensors = {}
        for target in spec.targets:
            down = torch.empty(target.width, base.hidden_size)
            up = torch.zeros(base.hidden_size, target.width)
            if spec.input == "residual":
                bound = base.hidden_size**-0.5
                down.uniform_(-bound, bound, generator=rng)
            else:
                down.normal_(0, BERT_STD, generator=rng)
                up.normal_(0, BERT_STD, generator=rng)
            tensors |= {target.down: down, target.down_bias: torch.zeros(target.width)}
            tensors |= {target.up: up, target.up_bias: torch.zeros(base.hidden_size)}
            if target.scaling is not None:
                tensors[target.scaling] = torch.ones(base.hidden_size if spec.channels else 1)
        return tensors

    def pack(
        self,
        spec: BottleneckSpec,
        base: Base,
        tensors: Tensors,
        weights: Mapping[str, torch.Tensor],
        dtype: torch.dtype,
    ) -> Packed:
        """One BottleneckDelta for each site."""
        return pack_deltas((_fold(target, spec, base, tensors, weights) for target in spec.targets), dtype)


def _fold(
    target: BottleneckTarget,
    spec: BottleneckSpec,
    base: Base,
    tensors: Tensors,
    weights: Mapping[str, torch.Tensor],
) -> BottleneckDelta:
    """Fold the scaling into U and u, and the norm's weight into D: of the norm only the division remains."""
    scaling = torch.tensor(spec.scaling) if target.scaling is None else tensors[target.scaling].float()
    down, epsilon = tensors[target.down].float(), 0.0
    if target.norm is not None:
        down, epsilon = down * weights[target.norm].float(), base.sites[target.norm].epsilon
    return BottleneckDelta(
        site=target.site,
        down=down,
        down_bias=tensors[target.down_bias].float(),
        up=(scaling.reshape(-1, 1) * tensors[target.up].float()).T,
        up_bias=scaling * tensors[target.up_bias].float(),
        non_linearity=spec.non_linearity,
        input=spec.input,
        epsilon=epsilon,
    )
