"""The table of methods. A new one is a file beside this and a line here."""

from server.adapters.methods.base import Method
from server.adapters.methods.lora import Lora


def build_methods(max_rank: int) -> dict[str, Method]:
    """Every method by name, as this server's limits allow it."""
    methods: list[Method] = [Lora(max_rank)]
    return {method.name: method for method in methods}


METHODS = build_methods(max_rank=256)
