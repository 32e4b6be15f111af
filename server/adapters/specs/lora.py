"""Uploads of LoRA as PEFT saves them; also rsLoRA, DoRA, rank and alpha patterns, biases of the base, norms.

The tensors decide which modules are targets; a config that disagrees is refused.
"""

import math
from collections.abc import Mapping

import msgspec

from server.adapters.formats.module_patterns import Patterns
from server.adapters.formats.peft import typed_config
from server.adapters.formats.peft_configs import LoraConfig
from server.adapters.formats.safetensors import TensorInfo
from server.adapters.sites import Base, Site
from server.adapters.specs.interface import AdapterFiles
from server.adapters.specs.norm_tensors import Norms, norm_shapes, norms_of
from server.adapters.specs.tensor_names import (
    TABLES,
    Endings,
    Roles,
    base_copies,
    by_site,
    check_shapes,
    check_targets,
    copy_shapes,
    invalid,
)
from server.errors import InvalidAdapter, shown

ENDINGS: Endings = {
    "lora_A.weight": ("A", ("linear",)),
    "lora_B.weight": ("B", ("linear",)),
    "lora_B.bias": ("bias", ("linear",)),
    "lora_magnitude_vector.weight": ("magnitude", TABLES),
    "lora_magnitude_vector": ("magnitude", TABLES),
    "lora_embedding_A": ("A", ("embedding",)),
    "lora_embedding_B": ("B", ("embedding",)),
    "base_layer.weight": ("copy", TABLES),
    "weight": ("copy", (*TABLES, "norm")),  # a norm's is trained, like its bias beside it
    "base_layer.bias": ("base_bias", ("linear",)),
    "bias": ("base_bias", ("linear", "norm")),
}
NOT_TARGETED = {"copy", "base_bias"}  # roles that a module has without being a target
OF_NORM = {"copy": "weight", "base_bias": "bias"}


class LoraTarget(msgspec.Struct, frozen=True):
    """One site's pair, by tensor names. A is [rank, in], B [out, rank]; magnitude and bias are [out].

    An embedding counts as in = vocabulary, out = hidden.
    """

    site: str
    rank: int
    scaling: float
    A: str
    B: str
    magnitude: str | None = None
    bias: str | None = None
    embedding: bool = False


class LoraSpec(msgspec.Struct, frozen=True):
    targets: tuple[LoraTarget, ...]
    base_copies: dict[str, str]  # tensor -> site whose weight it must equal
    biases: dict[str, str] = {}  # site -> tensor that replaces the base's bias there
    norms: Norms = {}  # trained beside the matrices

    @property
    def rank(self) -> int:
        return max(target.rank for target in self.targets)


class LoraReader:
    """`max_rank`: the highest rank that this server accepts."""

    name = "lora"

    def __init__(self, max_rank: int = 256) -> None:
        self.max_rank = max_rank

    def parse(self, files: AdapterFiles, base: Base) -> LoraSpec:
        config = typed_config(files.config, LoraConfig)
        roles = by_site(files.tensors, base, ENDINGS, "LoRA")
        norms = _take_norms(roles, base)
        ranks = Patterns([(key, float(rank)) for key, rank in config.rank_pattern], "rank_pattern")
        alphas = Patterns(list(config.alpha_pattern), "alpha_pattern")
        targets = []
        for name, found in roles.items():
            if not found.keys() - NOT_TARGETED:
                continue
            rank = int(ranks.value(name, config.r))
            alpha = alphas.value(name, config.lora_alpha)
            scaling = alpha / (math.sqrt(rank) if config.use_rslora else rank)
            targets.append(self._target(base.sites[name], found, rank, scaling, files.tensors, config))
        spec = LoraSpec(
            tuple(targets),
            base_copies(roles, base),
            {name: found["base_bias"] for name, found in roles.items() if "base_bias" in found},
            norms,
        )
        _check_modules(config, spec, base)
        _check_biases(config, spec, base)
        check_shapes(self.shapes(spec, base), files.tensors)
        return spec

    def shapes(self, spec: LoraSpec, base: Base) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {}
        for target in spec.targets:
            site = base.sites[target.site]
            shapes[target.A] = (target.rank, site.inputs)
            shapes[target.B] = (site.outputs, target.rank)
            for vector in (target.magnitude, target.bias):
                if vector is not None:
                    shapes[vector] = (site.outputs,)
        for name, tensor in spec.biases.items():
            shapes[tensor] = (base.sites[name].outputs,)
        return shapes | copy_shapes(spec.base_copies, base) | norm_shapes(spec.norms, base)

    def _target(
        self,
        site: Site,
        roles: dict[str, str],
        rank: int,
        scaling: float,
        tensors: dict[str, TensorInfo],
        config: LoraConfig,
    ) -> LoraTarget:
        """One site's tensors. Raises InvalidAdapter if one is missing or has another rank than configured."""
        wanted = {"A": True, "B": True, "magnitude": config.use_dora, "bias": config.lora_bias}
        for role, needed in wanted.items():
            if needed and role not in roles:
                missing = f"has no counterpart for {role} of {shown(site.name)}"
                raise invalid(next(iter(roles.values())), missing)
            if role in roles and not needed:
                raise invalid(roles[role], "is there although the config does not ask for it")
        shape = tensors[roles["A"]].shape
        if len(shape) != 2 or shape[0] > self.max_rank:
            raise invalid(roles["A"], f"has the shape {list(shape)}; its rank may be {self.max_rank} at most")
        if shape[0] != rank:
            raise invalid(roles["A"], f"has rank {shape[0]}, but the config says {rank}")
        if site.kind == "embedding" and config.use_dora:
            raise invalid(roles["A"], "is of an embedding, for which use_dora is not served")
        extras = (roles.get("magnitude"), roles.get("bias"))
        return LoraTarget(
            site.name, rank, scaling, roles["A"], roles["B"], *extras, embedding=site.kind == "embedding"
        )


def _take_norms(roles: Roles, base: Base) -> Norms:
    """The norms that have a weight, removed from `roles`. A bias alone belongs to the config's `bias`."""
    found = [name for name, own in roles.items() if base.sites[name].kind == "norm" and "copy" in own]
    own = {name: {OF_NORM[role]: tensor for role, tensor in roles.pop(name).items()} for name in found}
    return norms_of(own, base)


def _check_modules(config: LoraConfig, spec: LoraSpec, base: Base) -> None:
    filtered = config.exclude_modules or config.layers_to_transform is not None
    candidates = [site for site in base.sites.values() if site.kind in TABLES]
    targets = {target.site: target.A for target in spec.targets}
    check_targets(
        config.target_modules, targets, candidates, excluded=config.exclude_modules, complete=not filtered
    )
    _check_layers(config, targets)
    if config.ensure_weight_tying:
        _check_untied(targets, base)
    for module in config.modules_to_save or ():
        if not any(name.endswith(module) for name in [*spec.base_copies.values(), *spec.norms]):
            raise InvalidAdapter(
                f"modules_to_save names {shown(module)}, but there is no tensor for it.",
                param="modules_to_save",
            )


def _check_untied(targets: Mapping[str, str], base: Base) -> None:
    """Refuse ensure_weight_tying for an embedding or head: PEFT would add the same change to both."""
    for name, tensor in targets.items():
        site = base.sites[name]
        if site.kind == "embedding" or site.outputs == base.vocab_size:
            raise invalid(tensor, "changes both tables of the vocabulary if ensure_weight_tying is true")


def _check_layers(config: LoraConfig, targets: Mapping[str, str]) -> None:
    """Check `layers_to_transform`, which does not apply to a module that is named in full."""
    given = config.layers_to_transform
    layers = (given,) if isinstance(given, int) else given
    for name, tensor in targets.items():
        if not layers or name in (config.target_modules or ()):
            continue
        numbers = [int(part) for part in name.split(".") if part.isdecimal()]
        if not numbers or numbers[0] not in layers:
            raise invalid(tensor, "is of a layer that layers_to_transform leaves out")


def _check_biases(config: LoraConfig, spec: LoraSpec, base: Base) -> None:
    """Check that the biases are those that `bias` names: all of the base, or those of the targets."""
    wanted: set[str] = set()
    if config.bias == "all":
        wanted = {site.name for site in base.sites.values() if site.bias} - spec.norms.keys()
    elif config.bias == "lora_only":
        wanted = {target.site for target in spec.targets if base.sites[target.site].bias}
    for name, tensor in spec.biases.items():
        if name not in wanted:
            raise invalid(tensor, f"is there although bias is {config.bias!r}")
    if missing := sorted(wanted - spec.biases.keys()):
        raise InvalidAdapter(
            f"bias is {config.bias!r}, but there is no tensor for the bias of {shown(missing[0])}.",
            param="bias",
        )
