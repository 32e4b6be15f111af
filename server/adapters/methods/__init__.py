"""The table of methods. A new one is a file beside this and a line here."""

from collections.abc import Callable

from server.adapters.methods.base import Method
from server.adapters.methods.bottleneck import Bottleneck
from server.adapters.methods.lora import Lora

METHODS: dict[str, Callable[[int], Method]] = {
    Bottleneck.name: lambda _max_rank: Bottleneck(),
    Lora.name: Lora,
}


def build_methods(max_rank: int) -> dict[str, Method]:
    """Every method by name, under this server's limit."""
    return {name: method(max_rank) for name, method in METHODS.items()}
