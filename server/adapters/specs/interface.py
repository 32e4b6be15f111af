"""How an upload is read: its files as data, the spec made of them, and the reader that each method has."""

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
    """What `parse` made of an upload: frozen, complete, JSON-able."""

    @property
    def rank(self) -> int:
        """The highest rank or width of its matrices; 0 of a method that has none."""

    @property
    def base_copies(self) -> Mapping[str, str]:
        """Tensors that only repeat the base: {tensor: site}. The loader checks that they do."""


class SpecReader(Protocol):
    """Reads the uploads of one method. Stateless. `shapes` takes what this reader's `parse` returned."""

    @property
    def name(self) -> str:
        """The method's name, as manifests store it."""

    def parse(self, files: AdapterFiles, base: Base) -> Spec:
        """Read a config and tensor names. Raises InvalidAdapter on anything unknown or unservable."""

    def shapes(self, spec: Any, base: Base) -> dict[str, tuple[int, ...]]:
        """The exact tensors, {name: shape}: upload check, cache cost and training shapes come from here."""
