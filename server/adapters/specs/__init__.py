"""What an upload must look like: a reader for each PEFT method, of the config and the tensors' headers.

No torch here: the API checks uploads without it. To serve a further method, add

    formats/peft_configs.py    its config: a struct of the kept fields, and a `Fields` rule that says
                               which of its other fields are dropped, and which must have what value
    formats/peft.py            a line of TYPES: the peft_type, the method, that rule
    a file of specs/           its reader: which tensors there must be, of which shapes; a line below
    a file of methods/         how its tensors are packed and initialised, and the bank that applies them,
                               mostly AffineBank, whose kernels exist; a line of methods/__init__.py

Checks at upload, the cache, combining, memory and metrics follow from these. A bank that acts at a new place
of the forward pass also needs a hook: methods/interface.py. To train the method: finetune/recipe_methods.py.
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
