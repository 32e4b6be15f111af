"""The tensors of a safetensors file whose header was read (formats/safetensors.py), without a copy."""

import math
import mmap
from collections.abc import Mapping
from pathlib import Path

import torch

from server.adapters.formats.safetensors import ITEM_BYTES, TensorInfo
from server.errors import InvalidAdapter


def load_tensors(path: Path, header: dict[str, TensorInfo]) -> dict[str, torch.Tensor]:
    """The tensors of a file whose header `read_header` accepted, as views of the mapped file: no copy.

    Writing to one changes memory only. The file must not shrink while they are alive.
    """
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    return view_tensors(torch.frombuffer(mapped, dtype=torch.uint8), header)


def view_tensors(data: torch.Tensor, header: dict[str, TensorInfo]) -> dict[str, torch.Tensor]:
    """The same of a whole file in memory, uint8 [bytes]."""
    dtypes = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    if len(data) < max(info.end for info in header.values()):
        raise InvalidAdapter("The safetensors file is shorter than its header says.", param="files")
    ordered = sorted(header.items(), key=lambda item: item[1].begin)
    kinds, begin = {info.dtype for _, info in ordered}, ordered[0][1].begin
    size = ITEM_BYTES[ordered[0][1].dtype]
    if len(kinds) == 1 and begin % size == 0:  # as nearly all are: one after the other, without a hole
        parts = torch.split(
            data[begin:].view(dtypes[kinds.pop()]), [(info.end - info.begin) // size for _, info in ordered]
        )
        return {name: part.view(info.shape) for (name, info), part in zip(ordered, parts, strict=True)}
    tensors = {}
    for name, info in ordered:
        flat = data[info.begin : info.end]
        if info.begin % ITEM_BYTES[info.dtype]:  # legal, but kernels want aligned items
            flat = flat.clone()
        tensors[name] = flat.view(dtypes[info.dtype]).view(info.shape)
    return tensors


def find_non_finite(tensors: Mapping[str, torch.Tensor]) -> str | None:
    """The first tensor that holds NaN or Inf, reading every byte once."""
    return next((name for name, tensor in tensors.items() if not is_finite(tensor)), None)


def is_finite(tensor: torch.Tensor) -> bool:
    """Neither NaN nor Inf in it: one pass, and nothing written, where isfinite().all() takes three."""
    low, high = tensor.detach().aminmax()  # NaN wins in both
    return math.isfinite(low) and math.isfinite(high)
