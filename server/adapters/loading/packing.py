"""Makes a packed adapter of an adapter's file: parses it, checks it against the base, packs it."""

from collections.abc import Mapping
from dataclasses import replace
from math import prod

import torch

from adapters_store.manifest import Manifest
from server.adapters.checksum import checksum
from server.adapters.loading.parse_cache import HeaderLimits, PackPlan, ParseCache
from server.adapters.methods.interface import Method, Packed
from server.adapters.sites import Base
from server.adapters.specs.interface import Spec
from server.adapters.tensors import find_non_finite, view_tensors
from server.errors import InvalidAdapter
from server.kernels.weight_formats import WEIGHT_FORMATS

SPARE_BYTES = 64 << 10  # for parts that are absent from the file but not from the buffer, such as biases of 0


class Packer:
    """Packs for one base. Used on all of the loader's threads."""

    def __init__(
        self,
        methods: Mapping[str, Method],
        base: Base,
        weights: Mapping[str, torch.Tensor],  # the base's own, by site, read-only
        dtype: torch.dtype,
        limits: HeaderLimits,
        *,
        pin_memory: bool = False,  # pack into page-locked memory, for asynchronous copies to a GPU
    ) -> None:
        self.methods = methods
        self.base = base
        self.weights = weights
        self.dtype = dtype
        self.parse_cache = ParseCache(methods, base, limits)
        self.pin_memory = pin_memory

    def max_bytes(self, manifest: Manifest) -> int:
        """The most memory that packing takes beside the file: every number twice, scaled and packed."""
        numbers = sum(prod(shape) for _, shape in manifest.tensors.values())
        return 2 * numbers * max(self.dtype.itemsize, 4) + SPARE_BYTES

    def pack(self, manifest: Manifest, raw: torch.Tensor) -> Packed:
        """The adapter of `raw`, the weights file as uint8 [bytes].

        Raises InvalidAdapter, TooLarge or UnsupportedMedia.
        """
        plan = self.parse_cache.read(manifest, raw)
        packed = plan.replay(raw)
        if packed is None:
            packed = self._pack_by_method(manifest.method, plan, raw)
            plan.record(packed, raw)
            packed = replace(packed, copies=None)
        if self.pin_memory:
            packed = replace(packed, flat=packed.flat.pin_memory())
        return replace(packed, checksum=checksum(packed.flat))

    def _pack_by_method(self, method: str, plan: PackPlan, raw: torch.Tensor) -> Packed:
        tensors = view_tensors(raw, plan.header)
        self._check_base_copies(plan.spec, tensors)
        try:
            return self.methods[method].pack(plan.spec, self.base, tensors, self.weights, self.dtype)
        except InvalidAdapter:  # `pack` checks that all packed numbers are finite; here, which tensor is not
            if name := find_non_finite(tensors):
                raise InvalidAdapter(f"Tensor {name!r} holds NaN or Inf.", param=name) from None
            raise

    def _check_base_copies(self, spec: Spec, tensors: Mapping[str, torch.Tensor]) -> None:
        """Raises InvalidAdapter for a changed copy of a base table: PEFT saves them along with an adapter."""
        for name, site in spec.base_copies.items():
            if not WEIGHT_FORMATS[self.base.weight_format].is_copy(self.weights[site], tensors[name]):
                raise InvalidAdapter(
                    f"Tensor {name!r} replaces the base's {site!r}; only low-rank changes can be served.",
                    param=name,
                )
