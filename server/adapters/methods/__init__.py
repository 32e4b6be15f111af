"""The table of methods: each reads its uploads as `specs/` says and computes with torch."""

from server.adapters.methods.bitfit import Bitfit
from server.adapters.methods.bottleneck import Bottleneck
from server.adapters.methods.ia3 import Ia3
from server.adapters.methods.interface import Method
from server.adapters.methods.ln_tuning import LnTuning
from server.adapters.methods.lora import Lora, Narrow
from server.adapters.methods.prefix import Prefix
from server.adapters.methods.prompt import Prompt


def build_methods(max_rank: int, narrow: Narrow = "never") -> dict[str, Method]:
    """Every method by name, under this server's limit; `narrow` as Lora has it."""
    methods: list[Method] = [
        Bitfit(),
        Bottleneck(),
        Ia3(),
        LnTuning(),
        Lora(max_rank, narrow),
        Prefix(),
        Prompt(),
    ]
    return {method.name: method for method in methods}
