"""LN_TUNING: other weights and biases of norms (arXiv 2312.11420).

The norm is computed anew from its input. What it gave cannot be rescaled: where the base's weight is zero,
nothing is left to scale.
"""

from collections.abc import Mapping

import msgspec
import torch

from server.adapters.formats.peft import typed_config
from server.adapters.formats.peft_vectors import LnTuningConfig
from server.adapters.methods.base import AdapterFiles, Bank, NormParts, Packed, Rows, Tensors
from server.adapters.methods.tensors import (
    Endings,
    by_site,
    check_shapes,
    check_targets,
    flatten,
    invalid,
)
from server.adapters.sites import Base, Site
from server.errors import InvalidAdapter

ENDINGS: Endings = {
    "ln_tuning_layers.weight": ("weight", ("norm",)),
    "ln_tuning_layers.bias": ("bias", ("norm",)),
}


class LnTuningSpec(msgspec.Struct, frozen=True):
    """Both map a site to its tensor; a norm that the base biases has both."""

    weights: dict[str, str]
    biases: dict[str, str]
    rank: int = 0
    base_copies: dict[str, str] = {}


class NormBank(Bank):
    """By slot and site, the norm's parameters: [2, hidden] with a bias, else [1, hidden]."""

    def __init__(self, base: Base, slots: int, device: torch.device, dtype: torch.dtype) -> None:  # noqa: ARG002 - as Bank
        self.device = device
        self.parameters: list[dict[str, torch.Tensor]] = [{} for _ in range(slots + 1)]

    def put(self, slot: int, packed: Packed) -> None:
        flat = packed.flat.to(self.device, non_blocking=True)
        start = 0
        for site, rows, width in packed.layout:
            self.parameters[slot][site] = flat[start : start + rows * width].view(rows, width)
            start += rows * width

    def clear(self, slot: int) -> None:
        self.parameters[slot] = {}

    def norm(self, site: Site, parts: NormParts, x: torch.Tensor, y: torch.Tensor, rows: Rows) -> None:
        found = rows.spread(lambda slot: self.parameters[slot].get(site.name))
        if found is None:
            return
        rows.check(len(x))
        tokens, own = found
        fixed, scaled = parts(x[tokens])
        y[tokens] = fixed + scaled * own[:, 0] + (own[:, 1] if site.bias else 0)


class LnTuning:
    name = "ln_tuning"
    bank = NormBank

    def parse(self, files: AdapterFiles, base: Base) -> LnTuningSpec:
        config = typed_config(files.config, LnTuningConfig)
        roles = by_site(files.tensors, base, ENDINGS, "LN_TUNING")
        for site, found in roles.items():
            if found.keys() != ({"weight", "bias"} if base.sites[site].bias else {"weight"}):
                fault = "stands alone" if base.sites[site].bias else "is of a norm without a bias"
                raise invalid(found.get("bias", next(iter(found.values()))), fault)
        spec = LnTuningSpec(
            {site: found["weight"] for site, found in roles.items()},
            {site: found["bias"] for site, found in roles.items() if "bias" in found},
        )
        candidates = [site for site in base.sites.values() if site.kind == "norm"]
        excluded = config.exclude_modules
        check_targets(
            config.target_modules, spec.weights, candidates, excluded=excluded, complete=not excluded
        )
        check_shapes(self.shapes(spec, base), files.tensors)
        return spec

    def shapes(self, spec: LnTuningSpec, base: Base) -> dict[str, tuple[int, ...]]:
        of_sites = [*spec.weights.items(), *spec.biases.items()]
        return {tensor: (base.sites[site].outputs,) for site, tensor in of_sites}

    def init(
        self,
        spec: LnTuningSpec,  # noqa: ARG002 - as Method
        base: Base,  # noqa: ARG002 - as Method
        weights: Mapping[str, torch.Tensor],  # noqa: ARG002 - as Method
        rng: torch.Generator,  # noqa: ARG002 - as Method
    ) -> Tensors:
        """Not one of the methods that are trained here: InvalidAdapter."""
        raise InvalidAdapter("LN_TUNING is served, but not trained here.", param="method")

    def pack(
        self,
        spec: LnTuningSpec,
        base: Base,
        tensors: Tensors,
        weights: Mapping[str, torch.Tensor],  # noqa: ARG002 - as Method
        dtype: torch.dtype,
    ) -> Packed:
        layout, parts = [], []
        for site, weight in spec.weights.items():
            own = [tensors[name] for name in (weight, spec.biases.get(site)) if name is not None]
            layout.append((site, len(own), base.sites[site].outputs))
            parts += own
        return Packed(flatten(parts, dtype), layout)
