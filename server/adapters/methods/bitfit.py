"""BitFit: other biases, of linears and norms, whether or not the base has one there (arXiv 2106.10199).

Reads our own format, whose tensors replace the base's biases or are added to them, and PEFT's BEFT, which
adds. Either way a row is served the difference to the base (affine_bank.py).
"""

from collections.abc import Mapping

import msgspec
import torch
from safetensors.torch import save

from server.adapters.formats.config_fields import FILE
from server.adapters.formats.peft import typed_config
from server.adapters.formats.peft_configs import BeftConfig, BitfitConfig
from server.adapters.methods.affine_bank import AffineBank, pack_deltas
from server.adapters.methods.affine_layout import AffineDelta
from server.adapters.methods.interface import AdapterFiles, Packed, Tensors
from server.adapters.methods.tensor_names import (
    COPIES,
    PREFIX,
    Endings,
    base_copies,
    by_site,
    check_shapes,
    check_targets,
    copy_shapes,
)
from server.adapters.sites import Base
from server.errors import InvalidAdapter, shown

OWN: Endings = {"bias": ("bias", ("linear", "norm"))}
BEFT: Endings = {"beft_bias": ("bias", ("linear",)), **COPIES}
WEIGHTS = "adapter_model.safetensors"


class BitfitSpec(msgspec.Struct, frozen=True):
    """`absolute`: the tensors replace the base's biases; `beft`: they are [1, out], else [out]."""

    biases: dict[str, str]  # site -> tensor
    absolute: bool
    beft: bool
    base_copies: dict[str, str] = {}
    rank: int = 0


class Bitfit:
    name = "bitfit"
    bank = AffineBank

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

    def init(
        self,
        spec: BitfitSpec,
        base: Base,
        weights: Mapping[str, torch.Tensor],
        rng: torch.Generator,  # noqa: ARG002 - as Method
    ) -> Tensors:
        """The base's own biases: as they are, or as differences of zero."""
        shapes = self.shapes(spec, base)
        tensors = {tensor: torch.zeros(shapes[tensor]) for tensor in spec.biases.values()}
        for site, tensor in spec.biases.items():
            if spec.absolute and base.sites[site].bias:
                tensors[tensor] = weights[f"{site}.bias"].float().clone()
        return tensors

    def pack(
        self,
        spec: BitfitSpec,
        base: Base,
        tensors: Tensors,
        weights: Mapping[str, torch.Tensor],
        dtype: torch.dtype,
    ) -> Packed:
        deltas = bias_deltas(spec, base, tensors, weights)
        return pack_deltas((AffineDelta(site, bias=delta) for site, delta in deltas.items()), dtype)


def bias_deltas(
    spec: BitfitSpec, base: Base, tensors: Tensors, weights: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """What is added at each site: {site: [out]}, float32."""
    deltas = {}
    for site, tensor in spec.biases.items():
        deltas[site] = tensors[tensor].float().flatten()
        if spec.absolute and base.sites[site].bias:
            deltas[site] = deltas[site] - weights[f"{site}.bias"].float()
    return deltas


def to_beft(
    spec: BitfitSpec, base: Base, tensors: Tensors, weights: Mapping[str, torch.Tensor]
) -> dict[str, bytes]:
    """The files by which PEFT itself runs the adapter, by name.

    BEFT adds to the outputs of nn.Linear alone: InvalidAdapter for biases of norms and of GPT-2's Conv1D.
    """
    for site in spec.biases:
        if base.sites[site].kind != "linear" or base.sites[site].conv1d:
            raise InvalidAdapter(
                f"BEFT has no bias for {shown(site)}, which is no plain linear layer.", param="format"
            )
    config = {
        "peft_type": "BEFT",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "inference_mode": True,
        "target_modules": list(spec.biases),
    }
    deltas = bias_deltas(spec, base, tensors, weights)
    named = {f"{PREFIX}{site}.beft_bias": delta[None].contiguous() for site, delta in deltas.items()}
    return {FILE: msgspec.json.encode(config), WEIGHTS: save(named, {"format": "pt"})}
