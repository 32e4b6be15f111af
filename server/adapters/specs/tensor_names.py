"""Finds the site and the role of each tensor of an upload, and checks shapes.

Names are PEFT's: `base_model.model.MODULE.ENDING`. Each method has a table of its endings.
"""

from collections.abc import Iterable, Mapping

from server.adapters.formats.safetensors import TensorInfo
from server.adapters.sites import Base, Site
from server.base_model.families import HEAD_NORMS
from server.errors import InvalidAdapter, shown

PREFIX = "base_model.model."
ADAPTER = "default"  # PEFT's name for the adapter; some saves leave it in the tensors' names
Endings = Mapping[str, tuple[str, tuple[str, ...]]]  # ending -> (role, kinds of site); longer ones first
Roles = dict[str, dict[str, str]]  # site -> role -> tensor name

# PEFT saves the base's own matrix, too, if a linear or an embedding of the vocabulary is a target.
TABLES = ("linear", "embedding")
COPIES: Endings = {"base_layer.weight": ("copy", TABLES), "weight": ("copy", TABLES)}


def by_site(tensors: Iterable[str], base: Base, endings: Endings, what: str) -> Roles:
    """Every tensor by its site and role, sites in the base's order; `what` names the method in messages.

    Raises InvalidAdapter for a tensor that belongs to no site, and for two of the same role.
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
        if site.kind == "norm" and name.endswith(HEAD_NORMS):
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


def invalid(tensor: str, fault: str) -> InvalidAdapter:
    return InvalidAdapter(f"Tensor {shown(tensor, 128)} {fault}.", param=tensor)
