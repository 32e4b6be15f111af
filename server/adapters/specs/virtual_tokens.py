"""Virtual tokens in PEFT's files: one tensor, a row for each token."""

from server.adapters.formats.peft_configs import MAX_VIRTUAL
from server.adapters.sites import Base
from server.adapters.specs.interface import AdapterFiles
from server.adapters.specs.tensor_names import invalid
from server.errors import InvalidAdapter

TENSOR = "prompt_embeddings"


def check_tokens(files: AdapterFiles, base: Base, count: int) -> None:
    """Check that there is exactly the one tensor, with `count` rows. Raises InvalidAdapter.

    Its width is checked by the method.
    """
    for tensor in files.tensors:
        if tensor != TENSOR:
            raise invalid(tensor, f"is not one that virtual tokens have; there must be {TENSOR} alone")
    if TENSOR not in files.tensors:
        raise InvalidAdapter(f"The tensor {TENSOR!r} is missing.", param=TENSOR)
    shape = files.tensors[TENSOR].shape
    if len(shape) != 2 or shape[0] != count:
        raise invalid(TENSOR, f"has the shape {list(shape)}; num_virtual_tokens asks for [{count}, ...]")
    most = min(MAX_VIRTUAL, base.max_context - 2)  # a prompt has a token, and its answer has one
    if count > most:
        raise InvalidAdapter(
            f"num_virtual_tokens is {count}; a context of {base.max_context} leaves room for {most}.",
            param="num_virtual_tokens",
        )


def check_field(name: str, found: int | None, expected: int) -> None:
    """Raise InvalidAdapter if a field of the config, which repeats a size of the base, differs from it."""
    if found not in (None, expected):
        raise InvalidAdapter(
            f"adapter_config.json has {name} {found}; for this base model it must be {expected}.", param=name
        )
