"""Import of transformers' modelling code without torch's compiler and without its distributed tensors."""

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

ATTRIBUTE = "_dynamo"
DYNAMO = f"torch.{ATTRIBUTE}"
DISTRIBUTED = "is_torch_distributed_available"


def import_modeling() -> None:
    """Import `transformers.modeling_utils` in a process that neither compiles nor splits models.

    It asks for `torch._dynamo` only to mark functions that a compiler must not trace, and for
    `torch.distributed.tensor` only to load parts of a model onto several devices. Both together are 950
    modules and a quarter of the time that an engine's imports take. They stay importable: whoever needs them
    later gets the real ones.
    """
    if "transformers.modeling_utils" not in sys.modules and DYNAMO not in sys.modules:
        with _without_compiler(), _without_distributed():
            importlib.import_module("transformers.modeling_utils")


@contextmanager
def _without_compiler() -> Iterator[None]:
    """A package in the compiler's place with its submodules, and with marks that do nothing."""
    import torch

    stand_in: Any = ModuleType(DYNAMO)
    stand_in.__path__ = [str(Path(torch.__file__).with_name(ATTRIBUTE))]
    for mark in ("allow_in_graph", "assume_constant_result", "disable"):
        setattr(stand_in, mark, _no_mark)
    sys.modules[DYNAMO] = stand_in
    setattr(torch, ATTRIBUTE, stand_in)
    try:
        yield
    finally:
        del sys.modules[DYNAMO]
        delattr(torch, ATTRIBUTE)  # torch imports the real one when it is asked for


def _no_mark(function: Callable[..., Any] | None = None, *_: Any, **__: Any) -> Callable[..., Any]:
    return function if function is not None else _no_mark


@contextmanager
def _without_distributed() -> Iterator[None]:
    """transformers as with a torch that was built without torch.distributed."""
    homes = [
        importlib.import_module(name) for name in ("transformers.utils", "transformers.utils.import_utils")
    ]
    before = [getattr(home, DISTRIBUTED) for home in homes]
    for home in homes:
        setattr(home, DISTRIBUTED, lambda: False)
    try:
        yield
    finally:
        for home, function in zip(homes, before, strict=True):
            setattr(home, DISTRIBUTED, function)
