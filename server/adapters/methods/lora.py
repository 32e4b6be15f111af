"""LoRA: y += scaling * B A x at any linear, and at embeddings; with rsLoRA, DoRA, patterns and lora_bias.

This file reads what PEFT writes and says which tensors there must be. How it runs: affine.py.
What a target is, the tensors decide; the config only gives numbers, and must agree.
"""

import math
from collections.abc import Mapping

import msgspec
import torch

from server.adapters.formats.patterns import Patterns
from server.adapters.formats.peft import LoraConfig, lora_config
from server.adapters.formats.safetensors import TensorInfo
from server.adapters.methods.affine import AffineBank, Change, pack_changes
from server.adapters.methods.base import AdapterFiles, Packed, Tensors
from server.adapters.sites import Base, Site
from server.errors import InvalidAdapter, shown

PREFIX = "base_model.model."
ADAPTER = "default"  # PEFT's name for the adapter; some saves leave it in the tensors' names

# tensor name after the module's path -> (role, kind of site); longer endings first
ROLES: dict[str, tuple[str, str]] = {
    "lora_A.weight": ("A", "linear"),
    "lora_B.weight": ("B", "linear"),
    "lora_B.bias": ("bias", "linear"),
    "lora_magnitude_vector.weight": ("magnitude", ""),
    "lora_magnitude_vector": ("magnitude", ""),
    "lora_embedding_A": ("A", "embedding"),
    "lora_embedding_B": ("B", "embedding"),
    "base_layer.weight": ("copy", ""),
    "weight": ("copy", ""),
}


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

    @property
    def rank(self) -> int:
        return max(target.rank for target in self.targets)


Roles = dict[str, dict[str, str]]  # site -> role -> tensor name


class Lora:
    name = "lora"
    bank = AffineBank

    def __init__(self, max_rank: int = 256) -> None:
        self.max_rank = max_rank

    def parse(self, files: AdapterFiles, base: Base) -> LoraSpec:
        config = lora_config(files.config)
        roles: Roles = {}
        for tensor in files.tensors:
            name, role = _locate(tensor, base)
            if other := roles.setdefault(name, {}).get(role):
                raise _invalid(tensor, f"says the same as {shown(other)}")
            roles[name][role] = tensor
        sites = [site for site in base.sites.values() if roles.get(site.name, {}).keys() - {"copy"}]
        ranks = Patterns([(key, float(rank)) for key, rank in config.rank_pattern], "rank_pattern")
        alphas = Patterns(list(config.alpha_pattern), "alpha_pattern")
        targets = []
        for site in sites:
            rank = int(ranks.value(site.name, config.r))
            alpha = alphas.value(site.name, config.lora_alpha)
            scaling = alpha / (math.sqrt(rank) if config.use_rslora else rank)
            targets.append(self._target(site, roles[site.name], rank, scaling, files.tensors, config))
        _check_config(config, {target.site for target in targets}, roles, base)
        copies = {found["copy"]: name for name, found in roles.items() if "copy" in found}
        spec = LoraSpec(tuple(targets), copies)
        _check_shapes(self.shapes(spec, base), files.tensors)
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
        for tensor, name in spec.base_copies.items():
            site = base.sites[name]
            table = site.kind == "embedding"
            shapes[tensor] = (site.inputs, site.outputs) if table else (site.outputs, site.inputs)
        return shapes

    def init(self, spec: LoraSpec, base: Base, rng: torch.Generator) -> Tensors:
        """As PEFT starts: A Kaiming-uniform and B zero, so that the adapter begins as the base.

        DoRA's magnitudes begin as norms of the base's weights, which are not known here: InvalidAdapter.
        """
        if any(target.magnitude is not None for target in spec.targets):
            raise InvalidAdapter("use_dora cannot be trained here; train plain LoRA.", param="use_dora")
        tensors: Tensors = {}
        for target in spec.targets:
            site = base.sites[target.site]
            bound = 1 / math.sqrt(site.inputs)
            a = torch.empty(target.rank, site.inputs).uniform_(-bound, bound, generator=rng)
            b = torch.zeros(site.outputs, target.rank)
            if target.embedding:  # PEFT starts these the other way round
                a, b = torch.zeros_like(a), b.normal_(generator=rng)
            tensors |= {target.A: a, target.B: b}
            if target.bias is not None:
                tensors[target.bias] = torch.zeros(site.outputs)
        return tensors

    def pack(
        self,
        spec: LoraSpec,
        base: Base,
        tensors: Tensors,
        weights: Mapping[str, torch.Tensor],
        dtype: torch.dtype,
    ) -> Packed:
        return pack_changes(
            (fold(target, base.sites[target.site], tensors, weights) for target in spec.targets), dtype
        )

    def _target(
        self,
        site: Site,
        roles: dict[str, str],
        rank: int,
        scaling: float,
        tensors: dict[str, TensorInfo],
        config: LoraConfig,
    ) -> LoraTarget:
        """One site's tensors, complete and of the rank that the config says."""
        wanted = {"A": True, "B": True, "magnitude": config.use_dora, "bias": config.lora_bias}
        for role, needed in wanted.items():
            if needed and role not in roles:
                missing = f"has no counterpart for {role} of {shown(site.name)}"
                raise _invalid(next(iter(roles.values())), missing)
            if role in roles and not needed:
                raise _invalid(roles[role], "is there although the config does not ask for it")
        shape = tensors[roles["A"]].shape
        if len(shape) != 2 or shape[0] > self.max_rank:
            raise _invalid(
                roles["A"], f"has the shape {list(shape)}; its rank may be {self.max_rank} at most"
            )
        if shape[0] != rank:
            raise _invalid(roles["A"], f"has rank {shape[0]}, but the config says {rank}")
        if site.kind == "embedding" and config.use_dora:
            raise _invalid(roles["A"], "is of an embedding, for which use_dora is not served")
        extras = (roles.get("magnitude"), roles.get("bias"))
        return LoraTarget(
            site.name, rank, scaling, roles["A"], roles["B"], *extras, embedding=site.kind == "embedding"
        )


def fold(target: LoraTarget, site: Site, tensors: Tensors, weights: Mapping[str, torch.Tensor]) -> Change:
    """One target as an affine change, in float32. Formulas: PEFT's tuners/lora/layer.py and variants.py.

    DoRA (arXiv 2402.09353): y = base + (m/n - 1)(base - b) + (m/n) s B A x, with n the norm of each row of
    W + s B A; n is computed here, once.
    """
    a, b = tensors[target.A].float(), target.scaling * tensors[target.B].float()
    bias = None if target.bias is None else target.scaling * tensors[target.bias].float()
    if target.embedding:
        return Change(site.name, a.T.contiguous(), site.scale * b.T.contiguous())
    if target.magnitude is None:
        return Change(site.name, a, b.T.contiguous(), bias=bias)
    norm = torch.linalg.vector_norm(weights[site.name].float() + b @ a, dim=1)  # [out]
    ratio = tensors[target.magnitude].float() / norm
    return Change(
        site.name, a, (ratio[:, None] * b).T.contiguous(), ratio - 1, None if bias is None else ratio * bias
    )


def _locate(tensor: str, base: Base) -> tuple[str, str]:
    """Which site a tensor belongs to, and as what."""
    path = ".".join(part for part in tensor.removeprefix(PREFIX).split(".") if part != ADAPTER)
    for ending, (role, kind) in ROLES.items():
        name = path.removesuffix(f".{ending}")
        if name == path:
            continue
        site = base.sites.get(name)
        if site is None:
            raise _invalid(tensor, "belongs to no module of the base model")
        if kind and site.kind != kind:
            raise _invalid(tensor, f"cannot belong to {shown(name)}, which is of kind {site.kind}")
        if role == "copy" and (site.kind == "norm" or site.conv1d):
            raise _invalid(tensor, "replaces weights of the base, which only low-rank changes may touch")
        return name, role
    raise _invalid(tensor, "is not one that LoRA has")


def _check_config(config: LoraConfig, targets: set[str], roles: Roles, base: Base) -> None:
    """The config and the tensors speak of the same modules."""
    if not targets:
        raise InvalidAdapter(
            "The adapter has no LoRA tensors for any module of the base model.", param="files"
        )
    if config.target_modules is not None:
        if stray := sorted(site for site in targets if not _names(config.target_modules, site)):
            raise _invalid(
                next(iter(roles[stray[0]].values())), "is of a module that target_modules leaves out"
            )
        filtered = config.exclude_modules or config.layers_to_transform is not None
        kinds = ("linear", "embedding")
        asked = {
            s.name for s in base.sites.values() if s.kind in kinds and _names(config.target_modules, s.name)
        }
        if not filtered and (missing := sorted(asked - targets)):
            raise InvalidAdapter(
                f"target_modules names {shown(missing[0])}, but there is no tensor for it.",
                param="target_modules",
            )
    for module in config.modules_to_save or ():
        if not any(site.endswith(module) and "copy" in found for site, found in roles.items()):
            raise InvalidAdapter(
                f"modules_to_save names {shown(module)}, but there is no tensor for it.",
                param="modules_to_save",
            )


def _names(modules: tuple[str, ...], site: str) -> bool:
    """PEFT's rule for a list: the whole name, or its end after a dot."""
    return any(site == module or site.endswith(f".{module}") for module in modules)


def _check_shapes(shapes: dict[str, tuple[int, ...]], tensors: dict[str, TensorInfo]) -> None:
    for tensor, shape in shapes.items():
        if tensors[tensor].shape != shape:
            found = list(tensors[tensor].shape)
            raise _invalid(tensor, f"has the shape {found}; for this base model it must be {list(shape)}")


def _invalid(tensor: str, fault: str) -> InvalidAdapter:
    return InvalidAdapter(f"Tensor {shown(tensor, 128)} {fault}.", param=tensor)
