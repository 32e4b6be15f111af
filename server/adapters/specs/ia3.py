"""Uploads of IA3: one scaling vector for each targeted linear, upon its outputs or its inputs."""

import msgspec

from server.adapters.formats.peft import typed_config
from server.adapters.formats.peft_configs import Ia3Config
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

ENDINGS: Endings = {"ia3_l": ("scale", ("linear",)), **COPIES}


class Ia3Spec(msgspec.Struct, frozen=True):
    outputs: dict[str, str]  # site -> tensor [out, 1]
    inputs: dict[str, str]  # site -> tensor [1, in]
    base_copies: dict[str, str] = {}
    rank: int = 0


class Ia3Reader:
    name = "ia3"

    def parse(self, files: AdapterFiles, base: Base) -> Ia3Spec:
        config = typed_config(files.config, Ia3Config)
        roles = by_site(files.tensors, base, ENDINGS, "IA3")
        scales = {site: found["scale"] for site, found in roles.items() if "scale" in found}
        candidates = [site for site in base.sites.values() if site.kind == "linear"]
        excluded = config.exclude_modules
        check_targets(config.target_modules, scales, candidates, excluded=excluded, complete=not excluded)
        outputs, inputs = {}, {}
        for site, tensor in scales.items():
            if _feeds_forward(site, config, files.tensors[tensor].shape):
                inputs[site] = tensor
            else:
                outputs[site] = tensor
        spec = Ia3Spec(outputs, inputs, base_copies(roles, base))
        check_shapes(self.shapes(spec, base), files.tensors)
        return spec

    def shapes(self, spec: Ia3Spec, base: Base) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {
            tensor: (base.sites[site].outputs, 1) for site, tensor in spec.outputs.items()
        }
        shapes |= {tensor: (1, base.sites[site].inputs) for site, tensor in spec.inputs.items()}
        return shapes | copy_shapes(spec.base_copies, base)


def _feeds_forward(site: str, config: Ia3Config, shape: tuple[int, ...]) -> bool:
    """By PEFT's rule for a list: a name's end, dot or not. Where the config has none, the shape decides."""
    if config.feedforward_modules is None:
        return shape[:1] == (1,)
    return site.endswith(config.feedforward_modules)
