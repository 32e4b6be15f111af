"""An upload's tensors by module of the base: which module, as what, and of which shape.

Names are PEFT's: `base_model.model.MODULE.ENDING`. What an ending means, each method says.
"""

from collections.abc import Iterable, Mapping

import torch

from server.adapters.formats.safetensors import TensorInfo, is_finite
from server.adapters.sites import Base, Site
from server.errors import InvalidAdapter, shown
from server.kernels.cpu.pack_tensors import Copies, copies_of

PREFIX = "base_model.model."
ADAPTER = "default"  # PEFT's name for the adapter; some saves leave it in the tensors' names

INNER_NORMS = ("q_norm", "k_norm")  # they see heads, not tokens; nothing acts there

Endings = Mapping[str, tuple[str, tuple[str, ...]]]  # ending -> (role, kinds of site); longer ones first
Roles = dict[str, dict[str, str]]  # site -> role -> tensor name

# Where a table is targeted, PEFT saves the base's along with the adapter.
TABLES = ("linear", "embedding")
COPIES: Endings = {"base_layer.weight": ("copy", TABLES), "weight": ("copy", TABLES)}


def by_site(tensors: Iterable[str], base: Base, endings: Endings, what: str) -> Roles:
    """Every tensor's site and role, sites in the base's order. Raises InvalidAdapter for a stray one.

    `what` names the method in messages.
    """
    roles: Roles = {}
    for tensor in tensors:
        site, role = _locate(tensor, base, endings, what)
        if other := roles.setdefault(site, {}).get(role):
            raise invalid(tensor, f"says the same as {shown(other)}")
        roles[site][role] = tensor
    return {site: roles[site] for site in base.sites if site in roles}


def _locate(tensor: str, base: Base, endings: Endings, what: str) -> tuple[str, str]:
    path = ".".join(part for part in tensor.removeprefix(PREFIX).split(".") if part != ADAPTER)
    for ending, (role, kinds) in endings.items():
        name = path.removesuffix(f".{ending}")
        if name == path:
            continue
        site = base.sites.get(name)
        if site is None:
            raise invalid(tensor, "belongs to no module of the base model")
        if site.kind not in kinds:
            raise invalid(tensor, f"cannot belong to {shown(name)}, which is of kind {site.kind}")
        if site.kind == "norm" and name.endswith(INNER_NORMS):
            raise invalid(tensor, "is of a norm inside attention, which is not served")
        return name, role
    raise invalid(tensor, f"is not one that {what} has")


def base_copies(roles: Roles, base: Base) -> dict[str, str]:
    """The tensors that may only repeat the base's: {tensor: site}; whether they do, the loader checks."""
    copies = {found["copy"]: site for site, found in roles.items() if "copy" in found}
    for tensor, site in copies.items():
        if base.sites[site].conv1d:
            raise invalid(tensor, "replaces weights of the base, which only low-rank changes may touch")
    return copies


def copy_shapes(copies: Mapping[str, str], base: Base) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for tensor, name in copies.items():
        site = base.sites[name]
        table = site.kind == "embedding"
        shapes[tensor] = (site.inputs, site.outputs) if table else (site.outputs, site.inputs)
    return shapes


def check_targets(
    modules: tuple[str, ...] | None,
    targets: Mapping[str, str],
    candidates: Iterable[Site],
    *,
    excluded: tuple[str, ...] | None = None,
    complete: bool,
) -> None:
    """`target_modules` and the tensors speak of the same modules: `targets` maps a site to its tensor.

    With `complete` there must be a tensor for every candidate that `modules` names. For one that
    `exclude_modules` names there must be none: PEFT would not use it.
    """
    if not targets:
        raise InvalidAdapter("The adapter has no tensors for any module of the base model.", param="files")
    left_out = frozenset(excluded or ())
    if stray := sorted(site for site in targets if names(left_out, site)):
        raise invalid(targets[stray[0]], "is of a module that exclude_modules leaves out")
    if modules is None:
        return
    named = frozenset(modules)
    if stray := sorted(site for site in targets if not names(named, site)):
        raise invalid(targets[stray[0]], "is of a module that target_modules leaves out")
    asked = {site.name for site in candidates if names(named, site.name)}
    if complete and (missing := sorted(asked - targets.keys())):
        raise InvalidAdapter(
            f"target_modules names {shown(missing[0])}, but there is no tensor for it.",
            param="target_modules",
        )


def names(modules: frozenset[str], site: str) -> bool:
    """PEFT's rule for a list: the whole name, or its end after a dot. As fast however long the list is."""
    parts = site.split(".")
    return any(".".join(parts[i:]) in modules for i in range(len(parts)))


def check_shapes(shapes: Mapping[str, tuple[int, ...]], tensors: Mapping[str, TensorInfo]) -> None:
    for tensor, shape in shapes.items():
        if tensors[tensor].shape != shape:
            found = list(tensors[tensor].shape)
            raise invalid(tensor, f"has the shape {found}; for this base model it must be {list(shape)}")


def flatten(
    parts: Iterable[torch.Tensor], dtype: torch.dtype, factors: Iterable[float] | None = None
) -> torch.Tensor:
    """One host buffer of all of them, back to back, each times its factor if there are any.

    Every number is read once and written once, where it goes: transposed views need no copy of their own
    before. Raises InvalidAdapter if a value overflows `dtype`.
    """
    return flatten_noting(parts, dtype, factors)[0]


def flatten_noting(
    parts: Iterable[torch.Tensor], dtype: torch.dtype, factors: Iterable[float] | None = None
) -> tuple[torch.Tensor, Copies | None]:
    """The same, and how it was done, if it was nothing but copies."""
    parts = list(parts)
    scales = [1.0] * len(parts) if factors is None else list(factors)
    training = any(part.requires_grad for part in parts)
    copies = None if training else copies_of(parts, scales, dtype)
    flat = copies.run(0) if copies else _flattened(parts, dtype, scales, training=training)
    if flat is None or not (copies or is_finite(flat)):
        raise InvalidAdapter(f"The adapter overflows {str(dtype).removeprefix('torch.')} once it is scaled.")
    return flat, copies


def _flattened(
    parts: list[torch.Tensor], dtype: torch.dtype, scales: list[float], *, training: bool
) -> torch.Tensor:
    if training:  # gradients come back through this
        scaled = (p if scale == 1 else scale * p.float() for p, scale in zip(parts, scales, strict=True))
        return torch.cat([part.to(dtype).reshape(-1) for part in scaled])
    flat = torch.empty(sum(part.numel() for part in parts), dtype=dtype)
    places = torch.split(flat, [part.numel() for part in parts])
    for place, part, scale in zip(places, parts, scales, strict=True):
        if scale == 1:
            place.view(part.shape).copy_(part)
        else:  # products are float32's, whatever is stored
            torch.mul(part.float(), scale, out=place.view(part.shape))
    return flat


def invalid(tensor: str, fault: str) -> InvalidAdapter:
    return InvalidAdapter(f"Tensor {shown(tensor, 128)} {fault}.", param=tensor)
