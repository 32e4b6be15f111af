"""IA3: outputs of linears scaled, or, of feed-forward modules, their inputs (arXiv 2205.05638).

Scaling an output l * (W x + b) is affine at its site: gain l - 1 upon W x, and (l - 1) * b added.
"""

from collections.abc import Mapping

import msgspec
import torch

from server.adapters.formats.peft import typed_config
from server.adapters.formats.peft_configs import Ia3Config
from server.adapters.methods.affine_bank import AffineBank, pack_deltas
from server.adapters.methods.affine_layout import AffineDelta
from server.adapters.methods.interface import AdapterFiles, Packed, RecordedSites, Tensors
from server.adapters.methods.tensor_names import (
    COPIES,
    Endings,
    base_copies,
    by_site,
    check_shapes,
    check_targets,
    copy_shapes,
)
from server.adapters.methods.token_spans import TokenSpans
from server.adapters.sites import Base, Site

ENDINGS: Endings = {"ia3_l": ("scale", ("linear",)), **COPIES}


class Ia3Spec(msgspec.Struct, frozen=True):
    outputs: dict[str, str]  # site -> tensor [out, 1]
    inputs: dict[str, str]  # site -> tensor [1, in]
    base_copies: dict[str, str] = {}
    rank: int = 0


class Ia3Bank(AffineBank):
    """An affine bank that scales inputs, too; apart from the others', so that their rows never pay for it."""

    def inputs(self, site: Site, x: torch.Tensor, rows: TokenSpans) -> torch.Tensor:
        found = rows.spread(lambda slot: self._scale(slot, site.name))
        if found is None:
            return x
        rows.check(len(x))
        tokens, scales = found
        x = x.clone()
        x[tokens] *= scales
        return x

    def trace(self, slot: int) -> RecordedSites | None:
        """Inputs are scaled by the host's lists: no step of these is recorded."""
        held = self.held[slot]
        scales = held and any(piece.part == "scale" for piece in held.anatomy.layout)
        return None if scales else super().trace(slot)

    def _scale(self, slot: int, site: str) -> torch.Tensor | None:
        change = self.change(slot, site)
        return None if change is None else change.scale


class Ia3:
    name = "ia3"
    bank = Ia3Bank

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

    def init(
        self,
        spec: Ia3Spec,
        base: Base,
        weights: Mapping[str, torch.Tensor],  # noqa: ARG002 - as Method
        rng: torch.Generator,  # noqa: ARG002 - as Method
    ) -> Tensors:
        """As PEFT starts: ones."""
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
        changes = [
            AffineDelta(site, scale=tensors[tensor].float().flatten()) for site, tensor in spec.inputs.items()
        ]
        for site, tensor in spec.outputs.items():
            gain = tensors[tensor].float().flatten() - 1
            bias = gain * weights[f"{site}.bias"].float() if base.sites[site].bias else None
            changes.append(AffineDelta(site, gain=gain, bias=bias))
        return pack_deltas(changes, dtype)


def _feeds_forward(site: str, config: Ia3Config, shape: tuple[int, ...]) -> bool:
    """By PEFT's rule for a list: a name's end, dot or not. Where the config has none, the shape decides."""
    if config.feedforward_modules is None:
        return shape[:1] == (1,)
    return site.endswith(config.feedforward_modules)
