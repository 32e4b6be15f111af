"""The recipe of a PEFT method: a struct for each, with its settings, defaults, bounds and help. No torch.

recipe.py, the options of `polypeft tune` and their help are made of the structs. To train a further method,
add

    here                       its struct, and the struct to `Peft`
    modeling/new_adapter.py    the config and tensor shapes of a new adapter, which its reader in
                               adapters/specs/ checks; for virtual tokens also `num_virtual_tokens`
    modeling/adapter_model.py  only if its tensors start from the base, or its bank has no gradients, or acts
                               at a hook that `_begin` does not fill
    training/run.py            only if it starts from a text: `_init_text`
"""

from typing import Annotated, Any, ClassVar, Literal, get_args

import msgspec
from msgspec import Meta

from server.adapters.formats.adapterhub import NonLinearity
from server.adapters.formats.config_fields import ModuleName
from server.adapters.formats.peft_configs import MAX_VIRTUAL
from server.adapters.sites import Base, Site
from server.errors import shown
from server.finetune.recipe_fields import RequestFields

NumVirtualTokens = Annotated[int, Meta(ge=1, le=MAX_VIRTUAL, description="How many tokens are learnt.")]
InitText = Annotated[str, Meta(max_length=4096, description="What they start from; else the first example.")]


class MethodRecipe(msgspec.Struct, frozen=True, kw_only=True):
    """What recipe.py asks of every method. The description of a field is the help of its option."""

    default_learning_rate: ClassVar[float]  # its peak
    default_updates: ClassVar[int]  # about how many small data needs

    @classmethod
    def defaults(cls, requested: dict[str, Any], base: Base) -> dict[str, Any]:  # noqa: ARG003 - a default
        """Defaults that depend on the base or on another field that was requested."""
        return {}

    def check(self, request: RequestFields, base: Base, max_rank: int) -> None:
        """Raise InvalidField for a field that does not fit the base, or a rank above `max_rank`."""


class LoraRecipe(MethodRecipe, frozen=True, tag="lora", kw_only=True):
    """arXiv 2106.09685; rsLoRA 2312.03732; DoRA 2402.09353. Dropout acts on the input of A."""

    default_learning_rate = 5e-4
    default_updates = 150

    r: Annotated[int, Meta(ge=1, le=1024, description="Rank.")] = 16
    lora_alpha: Annotated[
        float, Meta(gt=0, le=1e4, description="What is added is scaled by lora_alpha / r.")
    ] = 32.0
    lora_dropout: Annotated[float, Meta(ge=0, lt=1, description="On the input.")] = 0.05
    target_modules: Annotated[
        tuple[ModuleName, ...],
        Meta(
            min_length=1,
            max_length=1024,
            description="Linear layers by their last names, with commas between; else all.",
        ),
    ] = ()
    use_rslora: Annotated[bool, Meta(description="Scale by lora_alpha / sqrt(r).")] = False
    use_dora: Annotated[bool, Meta(description="Train magnitudes apart from directions.")] = False

    @classmethod
    def defaults(cls, requested: dict[str, Any], base: Base) -> dict[str, Any]:  # noqa: ARG003 - as the base's
        return {"target_modules": inner_linears(base)}

    def check(self, request: RequestFields, base: Base, max_rank: int) -> None:
        if self.r > max_rank:
            raise request.invalid("r", f"it may be {max_rank} at most")
        names = [f".{site.name}" for site in layer_linears(base)]
        for module in self.target_modules:
            if not any(name.endswith(f".{module}") for name in names):
                known = ", ".join(inner_linears(base))
                rule = f"{shown(module)} is no linear layer of the base's blocks, which are {known}"
                raise request.invalid("target_modules", rule)


class BottleneckRecipe(MethodRecipe, frozen=True, tag="bottleneck", kw_only=True):
    """AdapterHub's seq_bn (Pfeiffer), double_seq_bn (Houlsby) and par_bn; `scaling` multiplies the output."""

    default_learning_rate = 1e-3
    default_updates = 200
    # AdapterHub's defaults, except that its par_bn has a reduction factor of 2
    placements: ClassVar[dict[str, dict[str, Any]]] = {
        "seq_bn": {},
        "double_seq_bn": {"non_linearity": "silu"},
        "par_bn": {"scaling": 4.0},
    }

    reduction_factor: Annotated[
        float, Meta(ge=0.5, le=1e4, description="The model's width over the bottleneck's.")
    ] = 16.0
    placement: Annotated[
        Literal["seq_bn", "double_seq_bn", "par_bn"],
        Meta(description="seq_bn (after MLPs), double_seq_bn (after attention too) or par_bn (beside MLPs)."),
    ] = "seq_bn"
    non_linearity: Annotated[NonLinearity, Meta(description="In the bottleneck: relu, silu, gelu, ...")] = (
        "relu"
    )
    scaling: Annotated[float, Meta(gt=0, le=100, description="Of what is added; 4 for par_bn.")] = 1.0

    @classmethod
    def defaults(cls, requested: dict[str, Any], base: Base) -> dict[str, Any]:  # noqa: ARG003 - as the base's
        return cls.placements[requested.get("placement", "seq_bn")]

    def check(self, request: RequestFields, base: Base, max_rank: int) -> None:  # noqa: ARG002 - as the base's
        if not any(site.kind == "mlp" for site in base.sites.values()):
            raise request.invalid("type", f"bottleneck adapters cannot be trained on a {base.model_type}")


class PrefixRecipe(MethodRecipe, frozen=True, tag="prefix", kw_only=True):
    """arXiv 2101.00190.

    Initialised with the keys and values of `init_text`; if empty, of the training data.
    """

    default_learning_rate = 5e-3
    default_updates = 300

    num_virtual_tokens: NumVirtualTokens = 16
    init_text: InitText = ""


class PromptRecipe(MethodRecipe, frozen=True, tag="prompt", kw_only=True):
    """arXiv 2104.08691. Initialised with the embeddings of `init_text`; if empty, of the training data."""

    default_learning_rate = 1e-2
    default_updates = 300

    num_virtual_tokens: NumVirtualTokens = 16
    init_text: InitText = ""


class BitfitRecipe(MethodRecipe, frozen=True, tag="bitfit", kw_only=True):
    """arXiv 2106.10199. Sites without a bias in the base get one, too."""

    default_learning_rate = 3e-3
    default_updates = 200

    biases: Annotated[
        Literal["all", "linear", "norm"], Meta(description="Which are trained: all, linear or norm.")
    ] = "all"


Peft = LoraRecipe | BottleneckRecipe | PrefixRecipe | PromptRecipe | BitfitRecipe
PEFT: dict[str, type[Peft]] = {str(kind.__struct_config__.tag): kind for kind in get_args(Peft)}


def inner_linears(base: Base) -> tuple[str, ...]:
    """The last name parts of all linears inside the layers, without the head: q_proj, down_proj, ..."""
    return tuple(dict.fromkeys(site.name.rpartition(".")[2] for site in layer_linears(base)))


def layer_linears(base: Base) -> list[Site]:
    """The sites of all linears inside the layers."""
    linears = (site for site in base.sites.values() if site.kind == "linear")
    return [site for site in linears if any(part.isdecimal() for part in site.name.split("."))]
