"""What an upload must look like, one file a method, from its config and the headers of its tensors.

No torch here: the API checks uploads without it. What a method computes is its namesake in `methods/`.
"""

from server.adapters.specs.bitfit import BitfitReader
from server.adapters.specs.bottleneck import BottleneckReader
from server.adapters.specs.ia3 import Ia3Reader
from server.adapters.specs.interface import SpecReader
from server.adapters.specs.ln_tuning import LnTuningReader
from server.adapters.specs.lora import LoraReader
from server.adapters.specs.prefix import PrefixReader
from server.adapters.specs.prompt import PromptReader


def build_readers(max_rank: int) -> dict[str, SpecReader]:
    """The reader of every method by the method's name. `max_rank`: the highest rank of a LoRA."""
    readers: list[SpecReader] = [
        BitfitReader(),
        BottleneckReader(),
        Ia3Reader(),
        LnTuningReader(),
        LoraReader(max_rank),
        PrefixReader(),
        PromptReader(),
    ]
    return {reader.name: reader for reader in readers}
