"""Uploads of BitFit: biases of linears and norms, in our own format or as PEFT's BEFT (arXiv 2106.10199).

The tensors of our format replace the base's biases or are added to them; those of BEFT are added.
"""

import msgspec

from server.adapters.formats.peft import typed_config
from server.adapters.formats.peft_configs import BeftConfig, BitfitConfig
from server.adapters.sites import Base
from server.adapters.specs.interface import AdapterFiles
from server.adapters.specs.tensor_names import (
    COPIES,
    Endings,
    base_copies,
    by_site,
    check_shapes,
    check_targets,
    copy_shapes,
)

OWN: Endings = {"bias": ("bias", ("linear", "norm"))}
BEFT: Endings = {"beft_bias": ("bias", ("linear",)), **COPIES}


class BitfitSpec(msgspec.Struct, frozen=True):
    """`absolute`: the tensors replace the base's biases; `beft`: they are [1, out], else [out]."""

    biases: dict[str, str]  # site -> tensor
    absolute: bool
    beft: bool
    base_copies: dict[str, str] = {}
    rank: int = 0


class BitfitReader:
    name = "bitfit"

    def parse(self, files: AdapterFiles, base: Base) -> BitfitSpec:
        beft = files.config.get("peft_type") == "BEFT"
        config = typed_config(files.config, BeftConfig) if beft else typed_config(files.config, BitfitConfig)
        roles = by_site(files.tensors, base, BEFT if beft else OWN, "BEFT" if beft else "BitFit")
        biases = {site: found["bias"] for site, found in roles.items() if "bias" in found}
        candidates = [site for site in base.sites.values() if site.kind == "linear"]
        check_targets(config.target_modules, biases, candidates, complete=True)
        absolute = isinstance(config, BitfitConfig) and config.bias_mode == "absolute"
        spec = BitfitSpec(biases, absolute, beft, base_copies(roles, base))
        check_shapes(self.shapes(spec, base), files.tensors)
        return spec

    def shapes(self, spec: BitfitSpec, base: Base) -> dict[str, tuple[int, ...]]:
        lead = (1,) if spec.beft else ()
        shapes = {tensor: (*lead, base.sites[site].outputs) for site, tensor in spec.biases.items()}
        return shapes | copy_shapes(spec.base_copies, base)
