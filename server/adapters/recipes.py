"""What an adapter's header and config mean, read once for all adapters that were made alike.

Thousands of adapters come from one recipe: the same base, targets and rank, so the same header and config to
the byte, and different numbers. Reading these is pure Python and keeps the interpreter from the engine, a few
milliseconds for the hundreds of tensors of a LoRA; so what the last few recipes came to is remembered.
"""

import io
from collections.abc import Callable, Mapping
from functools import lru_cache

import msgspec
import torch

from adapters_store.manifest import Manifest
from server.adapters.formats.safetensors import TensorInfo, read_header
from server.adapters.methods.base import AdapterFiles, Method, Spec
from server.adapters.sites import Base

KNOWN = 16  # recipes
LARGEST = 256 << 10  # bytes of a header that is remembered; what it means takes some five times as much

Meaning = tuple[dict[str, TensorInfo], Spec]


class Limits(msgspec.Struct, frozen=True):
    max_header_bytes: int
    max_tensors: int


class Recipes:
    """Used on all of the loader's threads."""

    def __init__(self, methods: Mapping[str, Method], base: Base, limits: Limits) -> None:
        self.methods = methods
        self.base = base
        self.limits = limits
        self._known: Callable[[str, bytes, bytes, int], Meaning] = lru_cache(KNOWN)(self._understand)

    def read(self, manifest: Manifest, raw: torch.Tensor) -> Meaning:
        """Of `raw`, the file as uint8 [bytes]. Raises what reading a header and a config raises."""
        length = 8 + min(int.from_bytes(raw[:8].numpy().data, "little"), self.limits.max_header_bytes)
        understand = self._known if length <= LARGEST else self._understand
        config = msgspec.json.encode(manifest.config)
        return understand(manifest.method, config, raw[:length].numpy().tobytes(), len(raw))

    def _understand(self, method: str, config: bytes, head: bytes, size: int) -> Meaning:
        header = read_header(
            io.BytesIO(head),
            size,
            max_header_bytes=self.limits.max_header_bytes,
            max_tensors=self.limits.max_tensors,
        )
        files = AdapterFiles(msgspec.json.decode(config), header)
        return header, self.methods[method].parse(files, self.base)
