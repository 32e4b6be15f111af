"""What an adapter's header and config mean, read once for all adapters that were made alike.

Thousands of adapters come from one recipe: the same base, targets and rank, so the same header and config to
the byte, and different numbers. Reading these is pure Python and keeps the interpreter from the engine, a few
milliseconds for the hundreds of tensors of a LoRA; so what the last few recipes came to is remembered.
"""

import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

import msgspec
import torch

from adapters_store.manifest import Manifest
from server.adapters.formats.safetensors import TensorInfo, read_header
from server.adapters.methods.interface import Method, Packed
from server.adapters.sites import Base
from server.adapters.specs.interface import AdapterFiles, Spec
from server.kernels.cpu.pack_tensors import Copies

MAX_PLANS = 16  # recipes
MAX_HEADER_BYTES = (
    256 << 10
)  # bytes of a header that is remembered; what it means takes some five times as much


@dataclass
class PackPlan:
    """`known`: an adapter of this recipe without its numbers, and how those came out of its file. It is there
    once one has been packed, if packing was nothing but copies.
    """

    header: dict[str, TensorInfo]
    spec: Spec
    known: tuple[Packed, Copies] | None = None

    def learn(self, packed: Packed, raw: torch.Tensor) -> None:
        """`packed` was made of `raw`, a file as uint8 [bytes]."""
        if packed.copies and not self.spec.base_copies and (copies := packed.copies.within(raw)):
            self.known = replace(packed, flat=packed.flat.new_empty(0), copies=None), copies

    def repeat(self, raw: torch.Tensor) -> Packed | None:
        """What packing would make of this file; None if that is not known, or a number is not finite."""
        if self.known is None:
            return None
        like, copies = self.known
        flat = copies.run(raw.data_ptr())
        return None if flat is None else replace(like, flat=flat)


class HeaderLimits(msgspec.Struct, frozen=True):
    max_header_bytes: int
    max_tensors: int


class ParseCache:
    """Used on all of the loader's threads."""

    def __init__(self, methods: Mapping[str, Method], base: Base, limits: HeaderLimits) -> None:
        self.methods = methods
        self.base = base
        self.limits = limits
        self._known: Callable[[str, bytes, bytes, int], PackPlan] = lru_cache(MAX_PLANS)(self._understand)

    def read(self, manifest: Manifest, raw: torch.Tensor) -> PackPlan:
        """Of `raw`, the file as uint8 [bytes]. Raises what reading a header and a config raises."""
        length = 8 + min(int.from_bytes(raw[:8].numpy().data, "little"), self.limits.max_header_bytes)
        understand = self._known if length <= MAX_HEADER_BYTES else self._understand
        config = msgspec.json.encode(manifest.config)
        return understand(manifest.method, config, raw[:length].numpy().tobytes(), len(raw))

    def _understand(self, method: str, config: bytes, head: bytes, size: int) -> PackPlan:
        header = read_header(
            io.BytesIO(head),
            size,
            max_header_bytes=self.limits.max_header_bytes,
            max_tensors=self.limits.max_tensors,
        )
        files = AdapterFiles(msgspec.json.decode(config), header)
        return PackPlan(header, self.methods[method].parse(files, self.base))
