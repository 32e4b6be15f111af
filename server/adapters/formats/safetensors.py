"""A reader of safetensors headers, stricter than the library's. Knows no method and no base.

    [8 bytes: n, little-endian] [n bytes: JSON header] [tensors, back to back, to the end of the file]

The header is read without the tensors and without torch, neither of which the API has. tensors.py makes the
tensors.
"""

import math
from typing import Any, BinaryIO

import msgspec

from server.adapters.formats.strict_json import strict_json
from server.errors import InvalidAdapter, TooLarge, UnsupportedMedia, shown

ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2}
MAX_NAME = 256
MAX_DIMS = 8
WHAT = "The safetensors header"

# First bytes of other kinds of files. Compared only if the file is no safetensors: its header may begin with
# the same bytes (a length of 640 looks like a pickle).
FOREIGN_MAGICS = {
    "a pickle": (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05", b"\x93NUMPY"),
    "a zip archive": (b"PK",),
    "gzip data": (b"\x1f\x8b",),
    "a compressed file": (b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd", b"7z\xbc\xaf", b"Rar!"),
    "a GGUF file": (b"GGUF", b"ggjt"),
    "an HDF5 file": (b"\x89HDF",),
    "a program": (b"\x7fELF", b"MZ", b"#!"),
}
TAR_MAGIC, TAR_OFFSET = b"ustar", 257


class TensorInfo(msgspec.Struct, frozen=True):
    """A tensor as the header describes it; its bytes are [begin, end) of the whole file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def read_header(
    file: BinaryIO, size: int, *, max_header_bytes: int, max_tensors: int
) -> dict[str, TensorInfo]:
    """Every tensor by name, from a file of `size` bytes whose position is at its start.

    Accepted are F32, F16 and BF16 tensors that fill the file without hole or overlap. Everything else
    raises InvalidAdapter, or UnsupportedMedia if the file is of another known kind.
    """
    start = file.read(512)
    length = int.from_bytes(start[:8], "little")
    if len(start) < 10 or start[8:9] != b"{" or not 0 < length <= min(size - 8, max_header_bytes):
        _refuse_foreign(start)
        if len(start) >= 8 and max_header_bytes < length <= size - 8:
            raise TooLarge(f"{WHAT} has {length} bytes, more than {max_header_bytes}.", param="files")
        raise _invalid("is not one: the file is cut short, or is something else")
    header = start[8 : 8 + length]
    header += file.read(length - len(header))
    entries = strict_json(header, WHAT, max_header_bytes)
    _check_metadata(entries.pop("__metadata__", {}))
    if not 0 < len(entries) <= max_tensors:
        raise _invalid(f"names {len(entries)} tensors; there must be 1 to {max_tensors}")
    infos = {name: _info(name, entry, 8 + length) for name, entry in entries.items()}
    _check_layout(infos, 8 + length, size)
    return infos


def _info(name: str, entry: Any, data: int) -> TensorInfo:
    """One entry of the header. `data`: offset in the file at which the tensors begin."""
    if not 0 < len(name) <= MAX_NAME or not name.isascii() or not name.isprintable():
        raise _invalid(f"names a tensor {shown(name)}; a name has 1 to {MAX_NAME} ASCII characters")
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise _invalid(f"must give dtype, shape and data_offsets of {shown(name)}, and nothing else")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise _invalid(f"gives {shown(name)} the dtype {shown(dtype)}; it must be {', '.join(ITEM_BYTES)}")
    if not _integers(shape) or len(shape) > MAX_DIMS or not all(0 < dim < 1 << 40 for dim in shape):
        raise _invalid(f"gives {shown(name)} the shape {shown(shape)}, which is not one of positive sizes")
    if not _integers(offsets) or len(offsets) != 2 or not 0 <= offsets[0] < offsets[1]:
        raise _invalid(f"gives {shown(name)} data_offsets {shown(offsets)}, which are not [begin, end]")
    begin, end = offsets
    if end - begin != math.prod(shape) * ITEM_BYTES[dtype]:
        raise _invalid(f"gives {shown(name)} {end - begin} bytes, not what {dtype} {shown(shape)} takes")
    return TensorInfo(dtype, tuple(shape), data + begin, data + end)


def _check_layout(infos: dict[str, TensorInfo], data: int, size: int) -> None:
    """Raises InvalidAdapter unless the tensors fill [data, size) without overlap or hole.

    Overlapping tensors would alias; a hole or a tail could hold another file.
    """
    position = data
    for name, info in sorted(infos.items(), key=lambda item: item[1].begin):
        if info.begin != position:
            fault = "overlaps the tensor before it" if info.begin < position else "leaves a hole before it"
            raise _invalid(f"places {shown(name)} so that it {fault}")
        position = info.end
    if position != size:
        fault = "ends before its tensors do" if position > size else "goes on after its last tensor"
        raise InvalidAdapter(f"The safetensors file {fault}.", param="files")


def _check_metadata(metadata: Any) -> None:
    """Raises InvalidAdapter unless all metadata is text. Nothing reads it."""
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _invalid("must hold text alone in __metadata__")


def _integers(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int for item in value)  # bool is an int, too


def _refuse_foreign(start: bytes) -> None:
    for kind, magics in FOREIGN_MAGICS.items():
        if start.startswith(magics):
            raise UnsupportedMedia(f"The file is {kind}, not safetensors.", param="files")
    if start[TAR_OFFSET:].startswith(TAR_MAGIC):
        raise UnsupportedMedia("The file is a tar archive, not safetensors.", param="files")


def _invalid(fault: str) -> InvalidAdapter:
    return InvalidAdapter(f"{WHAT} {fault}.", param="files")
