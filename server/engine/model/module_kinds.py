"""At which modules of a transformers model adapters can act, by class: the only place that asks."""

from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from server.adapters.sites import ModuleKind


def kind_of(module: nn.Module) -> ModuleKind | None:
    """The kind of site that a module can be; None for all other modules."""
    if isinstance(module, nn.Linear | Conv1D):
        return "linear"
    if isinstance(module, nn.Embedding):
        return "embedding"
    # not getattr: a site's `weight` is a property that unpacks it
    weight = dict(module.named_parameters(recurse=False)).get("weight")
    return "norm" if weight is not None and weight.dim() == 1 else None


def input_width(module: Any) -> int:
    """Numbers a module sees of each token: 1 of an embedding, which sees ids; 0 of one that is no site."""
    kind = kind_of(module)
    if kind == "linear":
        return int(module.nx) if isinstance(module, Conv1D) else int(module.in_features)
    if kind == "norm":
        return len(module.weight)
    return int(kind == "embedding")
