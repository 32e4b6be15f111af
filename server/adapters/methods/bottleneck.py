"""Bottleneck adapters: h += scaling * (U act(D x + d) + u) behind attention or MLP, as AdapterHub has it.

This file reads what AdapterHub writes and says which tensors there must be. How it runs: bottleneck_bank.py.
Here the config decides which layers have an adapter and how wide it is; the tensors must agree.
"""

from collections.abc import Iterator, Mapping
from typing import Literal

import msgspec
import torch

from server.adapters.formats.adapterhub import HubConfig, hub_config
from server.adapters.formats.safetensors import TensorInfo
from server.adapters.methods.bottleneck_bank import BottleneckBank, BottleneckDelta, pack_deltas
from server.adapters.methods.interface import AdapterFiles, Packed, Tensors
from server.adapters.methods.tensor_names import Roles, check_shapes, invalid
from server.adapters.sites import Base, Site
from server.errors import InvalidAdapter, shown
from server.kernels.cpu.grouped_bottleneck import MAX_WIDTH

# where in a layer -> (kind of site, the config's field, the norm behind it in a layer that has one there)
PLACES = {
    "attention_adapters": ("attention", "mh_adapter", "post_attention_layernorm"),
    "output_adapters": ("mlp", "output_adapter", "post_feedforward_layernorm"),
}
SANDWICHED = "pre_feedforward_layernorm"  # a layer that has it has norms behind its sub-blocks as well
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
BERT_STD = 0.02


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


class Bottleneck:
    name = "bottleneck"
    bank = BottleneckBank

    def parse(self, files: AdapterFiles, base: Base) -> BottleneckSpec:
        file = hub_config(files.config)
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

    def init(
        self,
        spec: BottleneckSpec,
        base: Base,
        weights: Mapping[str, torch.Tensor],  # noqa: ARG002 - as Method
        rng: torch.Generator,
    ) -> Tensors:
        """As AdapterHub starts: normal weights, or for parallel adapters Kaiming-uniform D and zero U."""
        tensors: Tensors = {}
        for target in spec.targets:
            down = torch.empty(target.width, base.hidden_size)
            up = torch.zeros(base.hidden_size, target.width)
            if spec.input == "residual":
                bound = base.hidden_size**-0.5
                down.uniform_(-bound, bound, generator=rng)
            else:
                down.normal_(0, BERT_STD, generator=rng)
                up.normal_(0, BERT_STD, generator=rng)
            tensors |= {target.down: down, target.down_bias: torch.zeros(target.width)}
            tensors |= {target.up: up, target.up_bias: torch.zeros(base.hidden_size)}
            if target.scaling is not None:
                tensors[target.scaling] = torch.ones(base.hidden_size if spec.channels else 1)
        return tensors

    def pack(
        self,
        spec: BottleneckSpec,
        base: Base,
        tensors: Tensors,
        weights: Mapping[str, torch.Tensor],
        dtype: torch.dtype,
    ) -> Packed:
        return pack_deltas((_fold(target, spec, base, tensors, weights) for target in spec.targets), dtype)


def _fold(
    target: BottleneckTarget,
    spec: BottleneckSpec,
    base: Base,
    tensors: Tensors,
    weights: Mapping[str, torch.Tensor],
) -> BottleneckDelta:
    """The scaling goes into U and u, the norm's gain into D, so that only its division is left to do."""
    scaling = torch.tensor(spec.scaling) if target.scaling is None else tensors[target.scaling].float()
    down, epsilon = tensors[target.down].float(), 0.0
    if target.norm is not None:
        down, epsilon = down * weights[target.norm].float(), base.sites[target.norm].epsilon
    return BottleneckDelta(
        site=target.site,
        down=down,
        down_bias=tensors[target.down_bias].float(),
        up=(scaling.reshape(-1, 1) * tensors[target.up].float()).T,
        up_bias=scaling * tensors[target.up_bias].float(),
        non_linearity=spec.non_linearity,
        input=spec.input,
        epsilon=epsilon,
    )


def _targets(file: HubConfig, roles: Roles, base: Base) -> Iterator[BottleneckTarget]:
    """Each site that the config names, with its tensors."""
    config = file.config
    norms = _norms(base) if config.input == "sum" else {}
    if norms and not config.original_ln_after:
        raise InvalidAdapter(
            f"original_ln_after must be true for a {base.model_type}, as AdapterHub has it.",
            param="original_ln_after",
        )
    kinds = {kind for kind, field, _norm in PLACES.values() if getattr(config, field)}
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
    """Which site each tensor belongs to, and as what. All keys must carry one adapter's name."""
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
    """Site, adapter's name and role: LAYER.PLACE.GROUP.NAME.ENDING."""
    for place, (kind, _field, _norm) in PLACES.items():
        layer, _, rest = tensor.partition(f".{place}.")
        group, _, rest = rest.partition(".")
        name, _, ending = rest.partition(".")
        site, role = places.get((layer, kind)), ROLES.get(ending)
        if group in GROUPS and site is not None and role is not None:
            return site, name, role
    raise invalid(tensor, "is not one that a bottleneck adapter of this base model has")


def _places(base: Base) -> dict[tuple[str, str], str]:
    """(layer's path, kind) -> site; the path also without its first part, as bare models save it."""
    places: dict[tuple[str, str], str] = {}
    for site in base.sites.values():
        if site.kind in ("attention", "mlp"):
            layer = site.name.rpartition(".")[0]
            places[layer, site.kind] = places[layer.partition(".")[2], site.kind] = site.name
    return places


def _norms(base: Base) -> dict[str, str]:
    """kind of site -> the norm that AdapterHub puts before an adapter, in a model with sandwiched sub-blocks.

    The library means the layer's own norm, but its hooks all hold the last layer's (adapters 1.3.0,
    init_bottleneck: the lambda reads the loop's variable). Adapters were trained so, and are served so.
    """
    layers = [site.name.rpartition(".")[0] for site in base.sites.values() if site.kind == "mlp"]
    last = max(layers, key=lambda layer: int(layer.rpartition(".")[2]), default="")
    if f"{last}.{SANDWICHED}" not in base.sites:
        return {}
    return {kind: f"{last}.{norm}" for kind, _field, norm in PLACES.values()}


def _layer(site: Site) -> int:
    """The layer's number in a sub-block's name; -1 of other sites."""
    number = site.name.split(".")[-2:-1]
    return int(number[0]) if number and number[0].isdecimal() else -1
