"""LoRA: y += scaling * B A x at linears and embeddings; also DoRA, biases and norms.

Here are the initial values and the folding of scalings into matrices; affine_bank.py applies them.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

import torch

from server.adapters.methods.affine_bank import AffineBank, pack_deltas
from server.adapters.methods.affine_layout import AffineDelta
from server.adapters.methods.interface import Packed, Tensors
from server.adapters.methods.norm_deltas import norm_deltas, norm_starts
from server.adapters.sites import Base, Site
from server.adapters.specs.lora import LoraReader, LoraSpec, LoraTarget
from server.kernels.cpu.grouped_affine import supports_bfloat16

Narrow = Literal["never", "exact", "rounded"]


class Lora(LoraReader):
    """`narrow`: whether A and B of a float32 engine on a CPU may be stored in bfloat16, which halves the
    bytes that each token reads: never, where that is exact, or also where it rounds.
    """

    bank = AffineBank

    def __init__(self, max_rank: int = 256, narrow: Narrow = "never") -> None:
        super().__init__(max_rank)
        self.narrow = narrow

    def init(
        self,
        spec: LoraSpec,
        base: Base,
        weights: Mapping[str, torch.Tensor],
        rng: torch.Generator,
    ) -> Tensors:
        """As in PEFT: A Kaiming-uniform and B zero, so that the adapter starts as the base.

        DoRA's magnitudes start as the norms of the base's weights, biases as the base's own.
        """
        tensors: Tensors = {
            tensor: weights[f"{name}.bias"].float().clone() for name, tensor in spec.biases.items()
        }
        for target in spec.targets:
            site = base.sites[target.site]
            bound = 1 / math.sqrt(site.inputs)
            a = torch.empty(target.rank, site.inputs).uniform_(-bound, bound, generator=rng)
            b = torch.zeros(site.outputs, target.rank)
            if target.embedding:  # PEFT has A zero and B normal there
                a, b = torch.zeros_like(a), b.normal_(generator=rng)
            tensors |= {target.A: a, target.B: b}
            if target.bias is not None:
                tensors[target.bias] = torch.zeros(site.outputs)
            if target.magnitude is not None:
                norm = torch.linalg.vector_norm(weights[target.site].float(), dim=1)
                tensors[target.magnitude] = norm
        return tensors | norm_starts(spec.norms, weights)

    def pack(
        self,
        spec: LoraSpec,
        base: Base,
        tensors: Tensors,
        weights: Mapping[str, torch.Tensor],
        dtype: torch.dtype,
    ) -> Packed:
        """One AffineDelta for each site: scaled matrices and bias, and trained biases of the base."""
        deltas = {
            target.site: fold(target, base.sites[target.site], tensors, weights) for target in spec.targets
        }
        for name, tensor in spec.biases.items():
            delta = deltas.get(name) or AffineDelta(name)
            bias = tensors[tensor].float() - weights[f"{name}.bias"].float()
            deltas[name] = replace(delta, bias=bias if delta.bias is None else delta.bias + bias)
        deltas |= {delta.site: delta for delta in norm_deltas(spec.norms, tensors)}
        in_bfloat16 = all(self._fits_bfloat16(delta, base.sites[name]) for name, delta in deltas.items())
        return pack_deltas(deltas.values(), torch.bfloat16 if in_bfloat16 else dtype)

    def _fits_bfloat16(self, delta: AffineDelta, site: Site) -> bool:
        """Whether `narrow` and the kernels allow this delta's matrices in bfloat16."""
        a, b = delta.a, delta.b
        if a is None or b is None or delta.gain is not None or delta.bias is not None:
            return False
        # saved in bfloat16, and scaled by a power of two, which changes no mantissa
        exact = a.dtype == b.dtype == torch.bfloat16 and abs(math.frexp(delta.factor)[0]) == 0.5
        allowed = self.narrow == "rounded" or (self.narrow == "exact" and exact)
        return allowed and site.kind == "linear" and supports_bfloat16(site.inputs, site.outputs)


def fold(
    target: LoraTarget, site: Site, tensors: Tensors, weights: Mapping[str, torch.Tensor]
) -> AffineDelta:
    """One target as an affine delta. Formulas: PEFT's tuners/lora/layer.py and variants.py.

    DoRA (arXiv 2402.09353): y = base + (m/n - 1)(base - b) + (m/n) s B A x, with n the norm of each row of
    W + s B A; n is computed here, once, and is a constant to gradients (section 4.3 of the paper).
    """
    a, b = tensors[target.A], tensors[target.B]
    bias = None if target.bias is None else target.scaling * tensors[target.bias].float()
    if target.embedding:
        return AffineDelta(site.name, a.T, target.scaling * b.float().T, factor=site.scale)
    if target.magnitude is None:
        return AffineDelta(site.name, a, b.T, bias=bias, factor=target.scaling)
    a, b = a.float(), target.scaling * b.float()
    with torch.no_grad():
        norm = torch.linalg.vector_norm(weights[site.name].float() + b @ a, dim=1)  # [out]
    ratio = tensors[target.magnitude].float() / norm
    return AffineDelta(
        site.name, a, (ratio[:, None] * b).T, ratio - 1, None if bias is None else ratio * bias
    )
