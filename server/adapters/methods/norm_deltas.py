"""A norm's own parameters in adapters: where training starts, and the deltas that replace the base's."""

from collections.abc import Iterator, Mapping

import torch

from server.adapters.methods.affine_layout import AffineDelta
from server.adapters.methods.interface import Tensors
from server.adapters.specs.norm_tensors import Norms


def norm_starts(norms: Norms, weights: Mapping[str, torch.Tensor]) -> Tensors:
    """The base's own parameters by the adapter's tensor names, float32 [width] each."""
    starts: Tensors = {}
    for site, norm in norms.items():
        starts[norm.weight] = weights[site].float().clone()
        if norm.bias is not None:
            starts[norm.bias] = weights[f"{site}.bias"].float().clone()
    return starts


def norm_deltas(norms: Norms, tensors: Tensors) -> Iterator[AffineDelta]:
    """One delta for each norm: `norm` is its weight, and its bias if it has one, [1 or 2, width]."""
    for site, norm in norms.items():
        weight = tensors[norm.weight]
        if norm.bias is None:
            yield AffineDelta(site, norm=weight[None])
        else:
            yield AffineDelta(site, norm=torch.stack([weight.float(), tensors[norm.bias].float()]))
