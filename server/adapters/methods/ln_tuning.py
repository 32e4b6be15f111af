"""LN_TUNING: other weights and biases of norms (arXiv 2312.11420). affine_bank.py runs them."""

from collections.abc import Mapping

import msgspec
import torch

from server.adapters.formats.peft import typed_config
from server.adapters.formats.peft_configs import LnTuningConfig
from server.adapters.methods.affine_bank import AffineBank, pack_deltas
from server.adapters.methods.interface import AdapterFiles, Packed, Tensors
from server.adapters.methods.norm_tensors import Norms, norm_changes, norm_shapes, norms_of
from server.adapters.methods.tensor_names import Endings, by_site, check_shapes, check_targets
from server.adapters.sites import Base
from server.errors import InvalidAdapter

ENDINGS: Endings = {
    "ln_tuning_layers.weight": ("weight", ("norm",)),
    "ln_tuning_layers.bias": ("bias", ("norm",)),
}


class LnTuningSpec(msgspec.Struct, frozen=True):
    norms: Norms
    rank: int = 0
    base_copies: dict[str, str] = {}


class LnTuning:
    name = "ln_tuning"
    bank = AffineBank

    def parse(self, files: AdapterFiles, base: Base) -> LnTuningSpec:
        config = typed_config(files.config, LnTuningConfig)
        roles = by_site(files.tensors, base, ENDINGS, "LN_TUNING")
        spec = LnTuningSpec(norms_of(roles, base))
        targets = {site: norm.weight for site, norm in spec.norms.items()}
        candidates = [site for site in base.sites.values() if site.kind == "norm"]
        excluded = config.exclude_modules
        check_targets(config.target_modules, targets, candidates, excluded=excluded, complete=not excluded)
        check_shapes(self.shapes(spec, base), files.tensors)
        return spec

    def shapes(self, spec: LnTuningSpec, base: Base) -> dict[str, tuple[int, ...]]:
        return norm_shapes(spec.norms, base)

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
        base: Base,  # noqa: ARG002 - as Method
        tensors: Tensors,
        weights: Mapping[str, torch.Tensor],  # noqa: ARG002 - as Method
        dtype: torch.dtype,
    ) -> Packed:
        return pack_deltas(norm_changes(spec.norms, tensors), dtype)
