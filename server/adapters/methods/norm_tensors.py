"""A norm's own parameters, as adapters bring them: alone (LN_TUNING) or beside a LoRA (`modules_to_save`)."""

from collections.abc import Iterator, Mapping

import msgspec
import torch

from server.adapters.methods.affine_layout import AffineDelta
from server.adapters.methods.interface import Tensors
from server.adapters.methods.tensor_names import Roles, invalid
from server.adapters.sites import Base


class NormTensors(msgspec.Struct, frozen=True):
    """The names of its tensors, each [width]; a norm that the base biases has both."""

    weight: str
    bias: str | None = None

    @property
    def names(self) -> list[str]:
        return [name for name in (self.weight, self.bias) if name is not None]


Norms = dict[str, NormTensors]  # by site


def norms_of(roles: Roles, base: Base) -> Norms:
    """Of sites that are norms, with the roles "weight" and "bias". Raises InvalidAdapter for half a norm."""
    for site, found in roles.items():
        if found.keys() != ({"weight", "bias"} if base.sites[site].bias else {"weight"}):
            fault = "stands alone" if base.sites[site].bias else "is of a norm without a bias"
            raise invalid(found.get("bias", next(iter(found.values()))), fault)
    return {site: NormTensors(**found) for site, found in roles.items()}


def norm_shapes(norms: Norms, base: Base) -> dict[str, tuple[int, ...]]:
    return {name: (base.sites[site].outputs,) for site, norm in norms.items() for name in norm.names}


def norm_starts(norms: Norms, weights: Mapping[str, torch.Tensor]) -> Tensors:
    """The base's own parameters, float32."""
    starts: Tensors = {}
    for site, norm in norms.items():
        starts[norm.weight] = weights[site].float().clone()
        if norm.bias is not None:
            starts[norm.bias] = weights[f"{site}.bias"].float().clone()
    return starts


def norm_changes(norms: Norms, tensors: Tensors) -> Iterator[AffineDelta]:
    for site, norm in norms.items():
        weight = tensors[norm.weight]
        if norm.bias is None:
            yield AffineDelta(site, norm=weight[None])
        else:
            yield AffineDelta(site, norm=torch.stack([weight.float(), tensors[norm.bias].float()]))
