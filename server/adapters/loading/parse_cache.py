"""A cache of parsed headers and configs, shared by all adapters that were made alike.

Thousands of adapters may have the same base, targets and rank: header and config are equal to the byte, and
only the numbers differ. Parsing is pure Python: a few milliseconds for the hundreds of tensors of a LoRA,
in which the engine cannot have the interpreter. So the last few parsed ones are kept.
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

MAX_PLANS = 16
MAX_HEADER_BYTES = 256 << 10  # of a cached header; its plan takes some five times as much


@dataclass
class PackPlan:
    """How files with one header and config are packed: tensors, spec, and once recorded a template.

    `template`: a packed adapter without its numbers, and the copies that made them from the file. It exists
    once an adapter has been packed, if packing was nothing but copies.
    """

    header: dict[str, TensorInfo]
    spec: Spec
    template: tuple[Packed, Copies] | None = None

    def record(self, packed: Packed, raw: torch.Tensor) -> None:
        """Keep how `packed` was made from `raw`, the file as uint8 [bytes]."""
        if packed.copies and not self.spec.base_copies and (copies := packed.copies.within(raw)):
            self.template = replace(packed, flat=packed.flat.new_empty(0), copies=None), copies

    def replay(self, raw: torch.Tensor) -> Packed | None:
        """`raw` packed as recorded; None if nothing was recorded, or a number is not finite."""
        if self.template is None:
            return None
        packed, copies = self.template
        flat = copies.run(raw.data_ptr())
        return None if flat is None else replace(packed, flat=flat)


class HeaderLimits(msgspec.Struct, frozen=True):
    """What `read_header` accepts."""

    max_header_bytes: int
    max_tensors: int


class ParseCache:
    """Plans by method, config, header and file size. Used on all of the loader's threads."""

    def __init__(self, methods: Mapping[str, Method], base: Base, limits: HeaderLimits) -> None:
        self.methods = methods
        self.base = base
        self.limits = limits
        self._cached: Callable[[str, bytes, bytes, int], PackPlan] = lru_cache(MAX_PLANS)(self._parse)

    def read(self, manifest: Manifest, raw: torch.Tensor) -> PackPlan:
        """The plan of `raw`, a file as uint8 [bytes]. Raises InvalidAdapter, TooLarge or UnsupportedMedia."""
        length = 8 + min(int.from_bytes(raw[:8].numpy().data, "little"), self.limits.max_header_bytes)
        parse = self._cached if length <= MAX_HEADER_BYTES else self._parse
        config = msgspec.json.encode(manifest.config)
        return parse(manifest.method, config, raw[:length].numpy().tobytes(), len(raw))

    def _parse(self, method: str, config: bytes, head: bytes, size: int) -> PackPlan:
        header = read_header(
            io.BytesIO(head),
            size,
            max_header_bytes=self.limits.max_header_bytes,
            max_tensors=self.limits.max_tensors,
        )
        files = AdapterFiles(msgspec.json.decode(config), header)
        return PackPlan(header, self.methods[method].parse(files, self.base))
