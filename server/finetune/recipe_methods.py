"""The recipe of a PEFT method: one struct for each of the five, with defaults and bounds. No torch."""

from typing import Annotated, Literal

import msgspec

from server.adapters.formats.adapterhub import NonLinearity
from server.adapters.formats.config_fields import ModuleName
from server.adapters.formats.peft_configs import MAX_VIRTUAL

NumVirtualTokens = Annotated[int, msgspec.Meta(ge=1, le=MAX_VIRTUAL)]
Text = Annotated[str, msgspec.Meta(max_length=4096)]
Placement = Literal["seq_bn", "double_seq_bn", "par_bn"]


class LoraRecipe(msgspec.Struct, frozen=True, tag="lora", kw_only=True):
    """arXiv 2106.09685; rsLoRA 2312.03732; DoRA 2402.09353. Dropout acts on the input of A."""

    r: Annotated[int, msgspec.Meta(ge=1, le=1024)] = 16
    lora_alpha: Annotated[float, msgspec.Meta(gt=0, le=1e4)] = 32.0
    lora_dropout: Annotated[float, msgspec.Meta(ge=0, lt=1)] = 0.05
    target_modules: Annotated[tuple[ModuleName, ...], msgspec.Meta(min_length=1, max_length=1024)] = ()
    use_rslora: bool = False
    use_dora: bool = False


class BottleneckRecipe(msgspec.Struct, frozen=True, tag="bottleneck", kw_only=True):
    """AdapterHub's seq_bn (Pfeiffer), double_seq_bn (Houlsby) and par_bn; `scaling` multiplies the output."""

    reduction_factor: Annotated[float, msgspec.Meta(ge=0.5, le=1e4)] = 16.0
    placement: Placement = "seq_bn"
    non_linearity: NonLinearity = "relu"
    scaling: Annotated[float, msgspec.Meta(gt=0, le=100)] = 1.0


class PrefixRecipe(msgspec.Struct, frozen=True, tag="prefix", kw_only=True):
    """arXiv 2101.00190.

    Initialised with the keys and values of `init_text`; if empty, of the training data.
    """

    num_virtual_tokens: NumVirtualTokens = 16
    init_text: Text = ""


class PromptRecipe(msgspec.Struct, frozen=True, tag="prompt", kw_only=True):
    """arXiv 2104.08691. Initialised with the embeddings of `init_text`; if empty, of the training data."""

    num_virtual_tokens: NumVirtualTokens = 16
    init_text: Text = ""


class BitfitRecipe(msgspec.Struct, frozen=True, tag="bitfit", kw_only=True):
    """arXiv 2106.10199. Sites without a bias in the base get one, too."""

    biases: Literal["all", "linear", "norm"] = "all"


Peft = LoraRecipe | BottleneckRecipe | PrefixRecipe | PromptRecipe | BitfitRecipe
PEFT: dict[str, type[Peft]] = {
    "lora": LoraRecipe,
    "bottleneck": BottleneckRecipe,
    "prefix": PrefixRecipe,
    "prompt": PromptRecipe,
    "bitfit": BitfitRecipe,
}
