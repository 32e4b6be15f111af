"""BitFit: other biases, of linears and norms, whether or not the base has one there (arXiv 2106.10199).

Whatever the format, a row is served the difference to the base's bias (affine_bank.py).
"""

from collections.abc import Mapping

import msgspec
import torch
from safetensors.torch import save

from server.adapters.formats.config_fields import FILE
from server.adapters.methods.affine_bank import AffineBank, pack_deltas
from server.adapters.methods.affine_layout import AffineDelta
from server.adapters.methods.interface import Packed, Tensors
from server.adapters.sites import Base
from server.adapters.specs.bitfit import BitfitReader, BitfitSpec
from server.adapters.specs.tensor_names import PREFIX
from server.errors import InvalidAdapter, shown

WEIGHTS = "adapter_model.safetensors"


class Bitfit(BitfitReader):
    bank = AffineBank

    def init(
        self,
        spec: BitfitSpec,
        base: Base,
        weights: Mapping[str, torch.Tensor],
        rng: torch.Generator,  # noqa: ARG002 - as Method
    ) -> Tensors:
        """The base's biases: as they are if the tensors replace them, else zeros to add."""
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
        """One bias [out] for each site."""
        deltas = bias_deltas(spec, base, tensors, weights)
        return pack_deltas((AffineDelta(site, bias=delta) for site, delta in deltas.items()), dtype)


def bias_deltas(
    spec: BitfitSpec, base: Base, tensors: Tensors, weights: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """What is added to the base's bias: {site: [out]}, float32."""
    deltas = {}
    for site, tensor in spec.biases.items():
        deltas[site] = tensors[tensor].float().flatten()
        if spec.absolute and base.sites[site].bias:
            deltas[site] = deltas[site] - weights[f"{site}.bias"].float()
    return deltas


def to_beft(
    spec: BitfitSpec, base: Base, tensors: Tensors, weights: Mapping[str, torch.Tensor]
) -> dict[str, bytes]:
    """The adapter as files of PEFT's BEFT, by name.

    BEFT only adds to the outputs of nn.Linear. Raises InvalidAdapter for biases of norms and of GPT-2's
    Conv1D.
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
