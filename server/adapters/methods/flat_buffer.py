"""An adapter's tensors in one flat host buffer, back to back, each times its factor."""

from collections.abc import Iterable

import torch

from server.adapters.tensors import is_finite
from server.errors import InvalidAdapter
from server.kernels.cpu.pack_tensors import Copies, copies_of


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
