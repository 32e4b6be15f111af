"""A metric family: its name, kind, help, labels and buckets. Declarations only; names.py lists them all."""

from collections.abc import Mapping
from typing import Literal, NamedTuple

Kind = Literal["counter", "gauge", "histogram"]
Values = tuple[str, ...]

# Upper bounds of buckets
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
SHORT = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
CALLS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
ROUTES = (0.01, 0.05, 0.25, 1, 5, 30, 120, 600)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
TOKENS = (1, 4, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)

VLLM = {"model_name": (), "engine": ("0",)}  # on every family of vLLM's


class Family(NamedTuple):
    name: str  # a counter's without `_total`
    kind: Kind
    help: str
    labels: Mapping[str, Values] = {}  # label -> its values; empty: see OPEN
    buckets: tuple[float, ...] = ()

    @property
    def all_labels(self) -> dict[str, Values]:
        """vLLM's base labels first."""
        return {**(VLLM if self.name.startswith("vllm:") else {}), **self.labels}

    @property
    def shown(self) -> str:
        """The name as /metrics has it."""
        return f"{self.name}_total" if self.kind == "counter" else self.name


def gauge(name: str, text: str, **labels: Values) -> Family:
    return Family(name, "gauge", text, labels)


def counter(name: str, text: str, **labels: Values) -> Family:
    return Family(name, "counter", text, labels)


def histogram(name: str, buckets: tuple[float, ...], text: str, **labels: Values) -> Family:
    return Family(name, "histogram", text, labels, buckets)
