"""How an upload is read: its files as data, the spec made of them, and the interface of a method's reader."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from server.adapters.formats.safetensors import TensorInfo
from server.adapters.sites import Base


@dataclass(frozen=True)
class AdapterFiles:
    """An upload as data: the parsed config and the header of the weights. No tensor bytes."""

    config: dict[str, Any]
    tensors: dict[str, TensorInfo]


class Spec(Protocol):
    """What `parse` made of an upload: frozen, complete, and JSON-serialisable."""

    @property
    def rank(self) -> int:
        """The highest rank or width of its matrices; 0 for a method without any."""

    @property
    def base_copies(self) -> Mapping[str, str]:
        """Tensors that must equal the base's own: {tensor: site}. The loader compares them."""


class SpecReader(Protocol):
    """Reads the uploads of one method. Stateless. `shapes` takes what this reader's `parse` returned."""

    @property
    def name(self) -> str:
        """The method's name, as manifests store it."""

    def parse(self, files: AdapterFiles, base: Base) -> Spec:
        """The spec of a config and headers. Raises InvalidAdapter for what is unknown or cannot be served."""

    def shapes(self, spec: Any, base: Base) -> dict[str, tuple[int, ...]]:
        """All tensors, {name: shape}; used to check uploads, to charge the cache and to start trainings."""
