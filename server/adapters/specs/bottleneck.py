"""Uploads of bottleneck adapters, as AdapterHub saves them.

The config decides which layers have an adapter and how wide it is; the tensors must agree.
"""

from collections.abc import Iterator
from typing import Literal

import msgspec

from server.adapters.formats.adapterhub import AdapterHubConfig, adapterhub_config
from server.adapters.formats.safetensors import TensorInfo
from server.adapters.sites import Base, Site
from server.adapters.specs.interface import AdapterFiles
from server.adapters.specs.tensor_names import Roles, check_shapes, invalid
from server.base_model.families import SANDWICHED, SubBlockKind
from server.errors import InvalidAdapter, shown
from server.kernels.limits import MAX_WIDTH

# where in a layer -> (kind of site, the config's field)
PLACES: dict[str, tuple[SubBlockKind, str]] = {
    "attention_adapters": ("attention", "mh_adapter"),
    "output_adapters": ("mlp", "output_adapter"),
}
# The part before the adapter's name; all but the first are what version 1 wrote.
GROUPS = frozenset(
    {
        "adapters",
        "attention_text_task_adapters",
        "attention_text_lang_adapters",
        "layer_text_task_adapters",
        "layer_text_lang_adapters",
    }
)
ROLES = {
    "adapter_down.0.weight": "down",
    "adapter_down.0.bias": "down_bias",
    "adapter_up.weight": "up",
    "adapter_up.bias": "up_bias",
    "scaling": "scaling",
}


class BottleneckTarget(msgspec.Struct, frozen=True, kw_only=True):
    """One site's adapter, by tensor names: D [width, hidden], d [width], U [hidden, width], u [hidden].

    `scaling`, where it was learned, is [1] or [hidden]. `norm` is the one x goes through first.
    """

    site: str
    width: int
    down: str
    down_bias: str
    up: str
    up_bias: str
    scaling: str | None = None
    norm: str | None = None


class BottleneckSpec(msgspec.Struct, frozen=True, kw_only=True):
    targets: tuple[BottleneckTarget, ...]
    non_linearity: str
    input: Literal["output", "residual", "sum"]
    scaling: float  # 1 where it was learned
    channels: bool  # a learned scaling has one value a channel

    @property
    def rank(self) -> int:
        return max(target.width for target in self.targets)

    @property
    def base_copies(self) -> dict[str, str]:
        return {}


class BottleneckReader:
    name = "bottleneck"

    def parse(self, files: AdapterFiles, base: Base) -> BottleneckSpec:
        file = adapterhub_config(files.config)
        config = file.config
        if file.model_type != base.model_type:
            raise InvalidAdapter(
                f"The adapter is for a {shown(file.model_type)}; this server runs a {base.model_type}.",
                param="model_type",
            )
        if not any(site.kind in ("attention", "mlp") for site in base.sites.values()):
            raise InvalidAdapter(
                f"Bottleneck adapters are not served on a {base.model_type}, whose layers have their norms "
                "elsewhere than before attention and MLP.",
                param="model_type",
            )
        roles = _locate(files.tensors, base)
        targets = tuple(_targets(file, roles, base))
        if stray := roles.keys() - {target.site for target in targets}:
            name = next(iter(roles[min(stray)].values()))
            raise invalid(name, "belongs to a place that the config leaves out")
        if not targets:
            raise InvalidAdapter("leave_out leaves no layer of the base model.", param="leave_out")
        spec = BottleneckSpec(
            targets=targets,
            non_linearity=config.non_linearity,
            input=config.input,
            scaling=1.0 if isinstance(config.scaling, str) else config.scaling,
            channels=config.scaling == "channel",
        )
        check_shapes(self.shapes(spec, base), files.tensors)
        return spec

    def shapes(self, spec: BottleneckSpec, base: Base) -> dict[str, tuple[int, ...]]:
        hidden = base.hidden_size
        shapes: dict[str, tuple[int, ...]] = {}
        for target in spec.targets:
            shapes |= {target.down: (target.width, hidden), target.down_bias: (target.width,)}
            shapes |= {target.up: (hidden, target.width), target.up_bias: (hidden,)}
            if target.scaling is not None:
                shapes[target.scaling] = (hidden,) if spec.channels else (1,)
        return shapes


def _targets(file: AdapterHubConfig, roles: Roles, base: Base) -> Iterator[BottleneckTarget]:
    """Each site that the config names, with its tensors. Raises InvalidAdapter."""
    config = file.config
    norms = _norms(base) if config.input == "sum" else {}
    if norms and not config.original_ln_after:
        raise InvalidAdapter(
            f"original_ln_after must be true for a {base.model_type}, as AdapterHub has it.",
            param="original_ln_after",
        )
    kinds = {kind for kind, field in PLACES.values() if getattr(config, field)}
    wanted = [role for role in ROLES.values() if role != "scaling" or isinstance(config.scaling, str)]
    for site in base.sites.values():
        layer = _layer(site)
        if site.kind not in kinds or layer in config.leave_out:
            continue
        width = max(1, int(base.hidden_size // config.factor(layer)))
        if width > MAX_WIDTH:
            raise InvalidAdapter(
                f"reduction_factor makes layer {layer} {width} wide; it may be {MAX_WIDTH} at most.",
                param="reduction_factor",
            )
        found = roles.get(site.name, {})
        if missing := [role for role in wanted if role not in found]:
            raise InvalidAdapter(
                f"The adapter has no {missing[0]} for {shown(site.name)}, which its config names.",
                param="files",
            )
        if extra := found.keys() - set(wanted):
            raise invalid(found[min(extra)], "is there although the config does not ask for it")
        yield BottleneckTarget(site=site.name, width=width, norm=norms.get(site.kind), **found)


def _locate(tensors: dict[str, TensorInfo], base: Base) -> Roles:
    """Every tensor by its site and role. Raises InvalidAdapter if the names hold more than one adapter's."""
    places = _places(base)
    roles: Roles = {}
    names = set()
    for tensor in tensors:
        site, name, role = _parse(tensor, places)
        if other := roles.setdefault(site, {}).get(role):
            raise invalid(tensor, f"says the same as {shown(other, 128)}")
        roles[site][role] = tensor
        names.add(name)
    if len(names) > 1:
        raise InvalidAdapter(f"The tensors belong to {len(names)} adapters, not to one.", param="files")
    return roles


def _parse(tensor: str, places: dict[tuple[str, str], str]) -> tuple[str, str, str]:
    """(site, adapter's name, role) of a tensor LAYER.PLACE.GROUP.NAME.ENDING. Raises InvalidAdapter."""
    for place, (kind, _field) in PLACES.items():
        layer, _, rest = tensor.partition(f".{place}.")
        group, _, rest = rest.partition(".")
        name, _, ending = rest.partition(".")
        site, role = places.get((layer, kind)), ROLES.get(ending)
        if group in GROUPS and site is not None and role is not None:
            return site, name, role
    raise invalid(tensor, "is not one that a bottleneck adapter of this base model has")


def _places(base: Base) -> dict[tuple[str, str], str]:
    """(layer's path, kind) -> site. The path also without its first part, for adapters of a bare model."""
    places: dict[tuple[str, str], str] = {}
    for site in base.sites.values():
        if site.kind in ("attention", "mlp"):
            layer = site.name.rpartition(".")[0]
            places[layer, site.kind] = places[layer.partition(".")[2], site.kind] = site.name
    return places


def _norms(base: Base) -> dict[str, str]:
    """kind of site -> the norm before an adapter, in a model that also has norms after its sub-blocks.

    AdapterHub intends the layer's own norm, but all of its hooks use the last layer's (adapters 1.3.0,
    init_bottleneck: the lambda reads the loop's variable). Adapters were trained with that norm.
    """
    layers = [site.name.rpartition(".")[0] for site in base.sites.values() if site.kind == "mlp"]
    last = max(layers, key=lambda layer: int(layer.rpartition(".")[2]), default="")
    if f"{last}.{SANDWICHED.mlp.norm_before}" not in base.sites:
        return {}
    return {kind: f"{last}.{block.norm_behind}" for kind, block in SANDWICHED.blocks.items()}


def _layer(site: Site) -> int:
    """The number of the layer that a sub-block belongs to; -1 for other sites."""
    number = site.name.split(".")[-2:-1]
    return int(number[0]) if number and number[0].isdecimal() else -1
