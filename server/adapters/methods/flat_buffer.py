"""An adapter's tensors in one flat host buffer, back to back, each times its factor."""

from collections.abc import Iterable

import torch

from server.adapters.tensors import is_finite
from server.errors import InvalidAdapter
from server.kernels.cpu.pack_tensors import Copies, copies_of


def flatten(
    parts: Iterable[torch.Tensor], dtype: torch.dtype, factors: Iterable[float] | None = None
) -> torch.Tensor:
    """All tensors in one host buffer [n] of `dtype`, back to back, each times its factor if there are any.

    Every number is read once and written once: transposed views are not copied first. Raises InvalidAdapter
    if a value overflows `dtype`.
    """
    return flatten_noting(parts, dtype, factors)[0]


def flatten_noting(
    parts: Iterable[torch.Tensor], dtype: torch.dtype, factors: Iterable[float] | None = None
) -> tuple[torch.Tensor, Copies | None]:
    """As `flatten`; also the copies that fill the buffer, if it took nothing but copies."""
    parts = list(parts)
    scales = [1.0] * len(parts) if factors is None else list(factors)
    training = any(part.requires_grad for part in parts)
    copies = None if training else copies_of(parts, scales, dtype)
    flat = copies.run(0) if copies else _concatenate(parts, dtype, scales, training=training)
    if flat is None or not (copies or is_finite(flat)):
        raise InvalidAdapter(f"The adapter overflows {str(dtype).removeprefix('torch.')} once it is scaled.")
    return flat, copies


def _concatenate(
    parts: list[torch.Tensor], dtype: torch.dtype, scales: list[float], *, training: bool
) -> torch.Tensor:
    if training:  # through which gradients flow back
        scaled = (p if scale == 1 else scale * p.float() for p, scale in zip(parts, scales, strict=True))
        return torch.cat([part.to(dtype).reshape(-1) for part in scaled])
    flat = torch.empty(sum(part.numel() for part in parts), dtype=dtype)
    views = torch.split(flat, [part.numel() for part in parts])
    for view, part, scale in zip(views, parts, scales, strict=True):
        if scale == 1:
            view.view(part.shape).copy_(part)
        else:  # computed in float32, whatever is stored
            torch.mul(part.float(), scale, out=view.view(part.shape))
    return flat
