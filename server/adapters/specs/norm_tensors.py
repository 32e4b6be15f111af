"""The tensors of a norm's own parameters: alone (LN_TUNING) or beside a LoRA (`modules_to_save`)."""

import msgspec

from server.adapters.sites import Base
from server.adapters.specs.tensor_names import Roles, invalid


class NormTensors(msgspec.Struct, frozen=True):
    """The names of a norm's tensors, each [width]; there is a bias exactly if the base's norm has one."""

    weight: str
    bias: str | None = None

    @property
    def names(self) -> list[str]:
        return [name for name in (self.weight, self.bias) if name is not None]


Norms = dict[str, NormTensors]  # by site


def norms_of(roles: Roles, base: Base) -> Norms:
    """The norms of `roles`, whose sites are norms and whose roles are "weight" and "bias".

    Raises InvalidAdapter if one of the two is missing, or there is a bias that the base's norm has not.
    """
    for site, found in roles.items():
        if found.keys() != ({"weight", "bias"} if base.sites[site].bias else {"weight"}):
            fault = "stands alone" if base.sites[site].bias else "is of a norm without a bias"
            raise invalid(found.get("bias", next(iter(found.values()))), fault)
    return {site: NormTensors(**found) for site, found in roles.items()}


def norm_shapes(norms: Norms, base: Base) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor: {tensor: (width,)}."""
    return {name: (base.sites[site].outputs,) for site, norm in norms.items() for name in norm.names}
