"""Uploads of LN_TUNING: weights and biases of norms (arXiv 2312.11420)."""

import msgspec

from server.adapters.formats.peft import typed_config
from server.adapters.formats.peft_configs import LnTuningConfig
from server.adapters.sites import Base
from server.adapters.specs.interface import AdapterFiles
from server.adapters.specs.norm_tensors import Norms, norm_shapes, norms_of
from server.adapters.specs.tensor_names import Endings, by_site, check_shapes, check_targets

ENDINGS: Endings = {
    "ln_tuning_layers.weight": ("weight", ("norm",)),
    "ln_tuning_layers.bias": ("bias", ("norm",)),
}


class LnTuningSpec(msgspec.Struct, frozen=True):
    norms: Norms
    rank: int = 0
    base_copies: dict[str, str] = {}


class LnTuningReader:
    name = "ln_tuning"

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
