"""AdapterHub's files: adapter_config.json of bottleneck adapters, and adapter_interface.json.

The config is a closed list of fields, as PEFT's is (config_fields.py), in the versions that the libraries
`adapters` and, before it, adapter-transformers wrote. The interface names the modules around which the
library put the adapters; it must be the one that the engine serves. Prediction heads have their own files,
not read.
"""

from typing import Annotated, Any, Literal

import msgspec

from server.adapters.formats.config_fields import Fields, refused
from server.adapters.formats.strict_json import strict_json
from server.base_model.families import DecoderLayer, layer_of
from server.errors import InvalidAdapter, shown

# These say how the adapter was made or trained, or qualify features that must be off.
DROPPED = frozenset({"config_id", "hidden_size", "model_class", "model_name", "name", "type"})
DROPPED_OF_CONFIG = frozenset(
    {
        "adapter_residual_before_ln",
        "attention_type",
        "dropout",
        "factorized_phm_W",
        "factorized_phm_rule",
        "hypercomplex_nonlinearity",
        "init_weights",
        "init_weights_seed",
        "inv_adapter_reduction_factor",
        "learn_phm",
        "new_attention_norm",
        "phm_bias",
        "phm_c_init",
        "phm_dim",
        "phm_init_range",
        "phm_rank",
        "shared_W_phm",
        "shared_phm_rule",
        "stochastic_depth",
    }
)
# These ask for another method, or for more than a bottleneck after a sub-block.
OFF = {
    "architecture": "it names another method",
    "cross_adapter": "it acts between an encoder and a decoder",
    "inv_adapter": "an invertible adapter changes the embeddings, too",
    "invertible_adapter": "an invertible adapter changes the embeddings, too",
    "ln_after": "a norm after the adapter is not served",
    "ln_before": "a norm before the adapter is not served",
    "phm_layer": "its matrices are products of smaller ones",
    "use_gating": "a gate averages over tokens that are yet to come",
}
# In configs without a version, these two names meant other functions.
OLD_NON_LINEARITIES = {"gelu": "gelu_new", "gelu_orig": "gelu"}

NonLinearity = Literal["relu", "silu", "gelu", "gelu_new", "tanh", "leakyrelu", "linear"]
Factor = Annotated[float, msgspec.Meta(ge=1e-3, le=1e6)]
Layer = Annotated[int, msgspec.Meta(ge=0, lt=10_000)]
LayerKey = Annotated[str, msgspec.Meta(pattern=r"\A(default|0|[1-9][0-9]{0,3})\Z")]


class BottleneckConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The kept fields of `config`. `original_*` and `residual_*` say where the residual stream is added."""

    mh_adapter: bool
    output_adapter: bool
    reduction_factor: Factor | dict[LayerKey, Factor]
    non_linearity: NonLinearity
    original_ln_before: bool = False
    original_ln_after: bool = True
    residual_before_ln: bool = True
    is_parallel: bool = False
    scaling: Annotated[float, msgspec.Meta(ge=-1e6, le=1e6)] | Literal["learned", "channel"] = 1.0
    leave_out: Annotated[tuple[Layer, ...], msgspec.Meta(max_length=10_000)] = ()

    @property
    def input(self) -> Literal["output", "residual", "sum"]:
        """The adapter's input: the sub-block's output, the residual stream before it, or their sum."""
        if self.is_parallel:
            return "residual"
        return "sum" if self.original_ln_before else "output"

    def factor(self, layer: int) -> float:
        """The reduction factor of a layer. Raises InvalidAdapter where the config gives none."""
        if not isinstance(self.reduction_factor, dict):
            return self.reduction_factor
        found = self.reduction_factor.get(str(layer), self.reduction_factor.get("default"))
        if found is None:
            raise InvalidAdapter(
                f"reduction_factor has neither layer {layer} nor a default.", param="reduction_factor"
            )
        return found


class AdapterHubConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The kept fields of a file. `version` marks that names are current ones."""

    model_type: Annotated[str, msgspec.Meta(max_length=64)]
    config: BottleneckConfig
    version: Literal["adapters"]


FILE_FIELDS = Fields(AdapterHubConfig, dropped=DROPPED)
CONFIG_FIELDS = Fields(BottleneckConfig, dropped=DROPPED_OF_CONFIG, empty=OFF)


def adapterhub_config(raw: dict[str, Any]) -> AdapterHubConfig:
    """Read a config as AdapterHub wrote it, or as it was kept. InvalidAdapter names the field."""
    inner = raw.get("config")
    if not isinstance(inner, dict):
        raise refused("config", inner, "it must be an object, not a name")
    current = {
        "non_linearity": _non_linearity(inner.get("non_linearity"), is_old="version" not in raw),
        "leave_out": _layers(inner.get("leave_out")),
    }
    config = CONFIG_FIELDS.read(inner | current)
    file = FILE_FIELDS.read(raw | {"config": msgspec.to_builtins(config), "version": "adapters"})
    assert isinstance(config, BottleneckConfig)
    assert isinstance(file, AdapterHubConfig)
    _check_residuals(config)
    return file


def _non_linearity(value: Any, *, is_old: bool) -> Any:
    """The current name of the function; one name for each."""
    if not isinstance(value, str):
        return value
    name = (OLD_NON_LINEARITIES.get(value, value) if is_old else value).lower()
    return "silu" if name == "swish" else name


def _layers(value: Any) -> Any:
    """The layers as a sorted set: their order has no meaning."""
    if value is None:
        return []
    if not isinstance(value, list) or not all(type(layer) is int for layer in value):
        raise refused("leave_out", value, "it must be a list of layer numbers")
    return sorted(set(value))


def _check_residuals(config: BottleneckConfig) -> None:
    """Raises InvalidAdapter unless the fields add the residual stream exactly once."""
    if not config.mh_adapter and not config.output_adapter:
        raise refused("output_adapter", False, "it or mh_adapter must be true")
    around = config.residual_before_ln if config.input == "sum" else True
    if config.original_ln_after is not around:
        rule = "with these other fields the residual stream would be added twice or never"
        raise refused("original_ln_after", config.original_ln_after, rule)


INTERFACE_FILE = "adapter_interface.json"
MAX_INTERFACE_BYTES = 64 << 10


def _interface(layer: DecoderLayer) -> dict[str, str | None]:
    """The fields that matter: modules whose outputs an adapter changes, norms whose inputs are the residual,
    and norms that the library applies before an adapter.
    """
    return {
        "layer_self_attn": layer.attention.name,
        "attn_o_proj": layer.attention.output,
        "layer_output_proj": f"{layer.mlp.name}.{layer.mlp.output}",
        "layer_pre_self_attn": layer.attention.norm_before,
        "layer_pre_ffn": layer.mlp.norm_before,
        "layer_ln_1": layer.attention.norm_behind,
        "layer_ln_2": layer.mlp.norm_behind,
    }


def check_interface(data: bytes, model_type: str) -> None:
    """Raises InvalidAdapter if the interface is not the one that the engine serves for `model_type`."""
    file = strict_json(data, INTERFACE_FILE, MAX_INTERFACE_BYTES)
    interface: Any = file.get("interface")
    if file.get("model_type") != model_type or not isinstance(interface, dict):
        raise InvalidAdapter(f"{INTERFACE_FILE} is not one for a {model_type}.", param=INTERFACE_FILE)
    for field, expected in _interface(layer_of(model_type)).items():
        found = interface.get(field)
        if found != expected:
            raise InvalidAdapter(
                f"{INTERFACE_FILE} has {field} {shown(found)}; "
                f"for a {model_type} it must be {shown(expected)}.",
                param=field,
            )
