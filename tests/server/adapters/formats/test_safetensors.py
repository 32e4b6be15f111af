"""A corpus of hostile files. The library accepts several: duplicate keys, NaN, zero-size dimensions."""

import gzip
import io
import json
import pickle
import struct
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save, save_file

from server.adapters.formats.safetensors import TensorInfo, read_header
from server.adapters.tensors import find_non_finite, load_tensors
from server.errors import InvalidAdapter, TooLarge, UnsupportedMedia
from tests.fixtures.cost import processor_seconds

CAP = 1 << 16


def header_of(data: bytes, size: int | None = None, max_tensors: int = 100) -> dict[str, TensorInfo]:
    return read_header(
        io.BytesIO(data), len(data) if size is None else size, max_header_bytes=CAP, max_tensors=max_tensors
    )


def build(header: Any, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(shape: Any, begin: Any, end: Any, dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


GOOD = {"a": entry([2], 0, 8), "b": entry([1, 2], 8, 16)}


def test_reads_what_the_library_writes(tmp_path: Path) -> None:
    tensors = {
        "a": torch.randn(3, 5),
        "b": torch.randn(7).half(),  # odd bytes before the next
        "c": torch.randn(2, 2, 2).bfloat16(),
        "d": torch.tensor(1.5),
    }
    path = tmp_path / "x.safetensors"
    save_file(tensors, path, metadata={"format": "pt"})
    with path.open("rb") as file:
        header = read_header(file, path.stat().st_size, max_header_bytes=CAP, max_tensors=4)
    loaded = load_tensors(path, header)
    expected = load_file(path)
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[n], expected[n]) and loaded[n].dtype == expected[n].dtype for n in expected)
    assert find_non_finite(load_tensors(path, header)) is None


def test_tensors_that_lie_askew_are_read_all_the_same(tmp_path: Path) -> None:
    text = json.dumps({"a": entry([2], 0, 8)}).encode()
    text += b" " * (1 - (8 + len(text)) % 2 + 4)
    path = tmp_path / "x"
    path.write_bytes(build(text, struct.pack("<2f", 1.5, -2.0)))
    header = header_of(path.read_bytes())
    assert header["a"].begin % 2 == 1
    assert load_tensors(path, header)["a"].tolist() == [1.5, -2.0]


def test_writing_to_a_tensor_leaves_the_file(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(before := build(GOOD, bytes(16)))
    load_tensors(path, header_of(before))["a"].fill_(1)
    assert path.read_bytes() == before


FAULTS = {
    "empty": b"",
    "short": b"\x01\x02",
    "no header": struct.pack("<Q", 0),
    "length beyond the file": struct.pack("<Q", 500) + b"{}",
    "length of 2^63": struct.pack("<Q", 1 << 63) + b"{}" * 10,
    "not json": build(b"{nonsense}"),
    "not utf-8": build(b'{"\xff": 1}'),
    "bom": build(b"\xef\xbb\xbf{}"),
    "array": build(b"[]"),
    "no tensors": build({}),
    "only metadata": build({"__metadata__": {"format": "pt"}}),
    "metadata of numbers": build(GOOD | {"__metadata__": {"a": 1}}, bytes(16)),
    "metadata a list": build(GOOD | {"__metadata__": []}, bytes(16)),
    "duplicate tensor": build(b'{"a": %s, "a": %s}' % ((json.dumps(GOOD["a"]).encode(),) * 2), bytes(8)),
    "duplicate field": build(
        b'{"a": {"dtype":"F32","dtype":"F16","shape":[2],"data_offsets":[0,8]}}', bytes(8)
    ),
    "nan in json": build(b'{"a": NaN}'),
    "deep": build(b'{"a":' + b"[" * 30000 + b"]" * 30000 + b"}"),
    "overlap": build({"a": entry([2], 0, 8), "b": entry([2], 4, 12)}, bytes(12)),
    "the same bytes twice": build({"a": entry([2], 0, 8), "b": entry([2], 0, 8)}, bytes(8)),
    "hole": build({"a": entry([2], 0, 8), "b": entry([2], 12, 20)}, bytes(20)),
    "hole at the start": build({"a": entry([2], 4, 12)}, bytes(12)),
    "trailing bytes": build(GOOD, bytes(17)),
    "cut": build(GOOD, bytes(15)),
    "size mismatch": build({"a": entry([3], 0, 8)}, bytes(8)),
    "zero-size": build({"a": entry([0], 0, 0)}),
    "zero dimension": build({"a": entry([2, 0], 0, 8)}, bytes(8)),
    "negative": build({"a": entry([-2, -1], 0, 8)}, bytes(8)),
    "bool": build({"a": entry([True, 2], 0, 8)}, bytes(8)),
    "float": build({"a": entry([2.0], 0, 8)}, bytes(8)),
    "huge": build({"a": entry([1 << 62, 4], 0, 8)}, bytes(8)),
    "thousands of digits": build(
        b'{"a":{"dtype":"F32","shape":[%s],"data_offsets":[0,8]}}' % (b"9" * 5000), bytes(8)
    ),
    "nine dimensions": build({"a": entry([1] * 8 + [2], 0, 8)}, bytes(8)),
    "backwards": build({"a": entry([2], 8, 0)}, bytes(8)),
    "negative offset": build({"a": entry([2], -8, 0)}, bytes(8)),
    "three offsets": build({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4, 8]}}, bytes(8)),
    "bool offset": build({"a": entry([2], False, 8)}, bytes(8)),
    "f64": build({"a": entry([1], 0, 8, "F64")}, bytes(8)),
    "i64": build({"a": entry([1], 0, 8, "I64")}, bytes(8)),
    "unknown dtype": build({"a": entry([2], 0, 8, "F33")}, bytes(8)),
    "dtype a list": build({"a": entry([2], 0, 8, ["F32"])}, bytes(8)),
    "unknown field": build({"a": GOOD["a"] | {"x": 1}}, bytes(8)),
    "missing field": build({"a": {"dtype": "F32", "shape": [2]}}, bytes(8)),
    "null": build({"a": None}),
    "long name": build({"a" * 257: GOOD["a"]}, bytes(8)),
    "empty name": build({"": GOOD["a"]}, bytes(8)),
    "control name": build({"a\n": GOOD["a"]}, bytes(8)),
    "surrogate name": build(b'{"\\ud800": %s}' % json.dumps(GOOD["a"]).encode(), bytes(8)),
}


@pytest.mark.parametrize("data", FAULTS.values(), ids=FAULTS.keys())
def test_faulty_files_are_refused_soon_and_in_one_sentence(data: bytes) -> None:
    with processor_seconds(1), pytest.raises(InvalidAdapter) as caught:
        header_of(data)
    message = caught.value.message
    assert message.endswith(".")
    assert len(message) < 300
    assert message.isascii()
    assert message.isprintable()


def tar() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("adapter_model.safetensors"))
    return buffer.getvalue()


def archive() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("x", bytes(1000))
    return buffer.getvalue()


def saved_by_torch(*, zipped: bool) -> bytes:
    buffer = io.BytesIO()
    torch.save({"a": torch.zeros(2)}, buffer, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


FOREIGN = {
    **{f"pickle {p}": pickle.dumps({"a": [1] * 100}, protocol=p) for p in (2, 3, 4, 5)},
    "torch zip": saved_by_torch(zipped=True),
    "torch pickle": saved_by_torch(zipped=False),
    "zip": archive(),
    "tar": tar(),
    "gzip": gzip.compress(bytes(10), mtime=1),
    "gzip without time, and long": gzip.compress(bytes(10), mtime=0) + bytes(1 << 20),
    "gzip of a good file": gzip.compress(build(GOOD, bytes(16))),
    "gguf": b"GGUF" + bytes(100),
}


@pytest.mark.parametrize("data", FOREIGN.values(), ids=FOREIGN.keys())
def test_other_kinds_of_file_are_named(data: bytes) -> None:
    with pytest.raises(UnsupportedMedia, match="not safetensors"):
        header_of(data)


def test_a_header_that_begins_like_a_pickle_is_read() -> None:
    text = json.dumps(GOOD).encode().ljust(640)
    data = build(text, bytes(16))
    assert data.startswith(b"\x80\x02")
    assert header_of(data).keys() == GOOD.keys()


def test_caps() -> None:
    many = {f"t{i}": entry([1], 4 * i, 4 * i + 4) for i in range(5)}
    assert len(header_of(build(many, bytes(20)), max_tensors=5)) == 5
    with pytest.raises(InvalidAdapter, match="4"):
        header_of(build(many, bytes(20)), max_tensors=4)
    with pytest.raises(TooLarge, match=str(CAP)):
        header_of(build(json.dumps(GOOD).encode().ljust(CAP + 1), bytes(16)))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("at", [0, 12345, 99_999])
def test_non_finite_values_are_found_wherever_they_are(
    tmp_path: Path, bad: float, dtype: torch.dtype, at: int
) -> None:
    tensor = torch.zeros(100_000, dtype=dtype)
    tensor[at] = bad
    path = tmp_path / "x"
    path.write_bytes(data := save({"good": torch.ones(3), "late": tensor}))
    assert find_non_finite(load_tensors(path, header_of(data))) == "late"


def test_a_file_that_shrank_is_refused(tmp_path: Path) -> None:
    data = build(GOOD, bytes(16))
    (tmp_path / "x").write_bytes(data[:-1])
    with pytest.raises(InvalidAdapter, match="shorter"):
        load_tensors(tmp_path / "x", header_of(data))


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_mutants_are_read_or_refused_and_never_crash(data: st.DataObject) -> None:
    """Flips, cuts and insertions of a good file: what is accepted tiles the file exactly."""
    mutant = bytearray(build({"__metadata__": {"format": "pt"}, **GOOD}, bytes(16)))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(mutant) - 1))
        match data.draw(st.sampled_from(["flip", "cut", "insert"])):
            case "flip":
                mutant[at] = data.draw(st.integers(0, 255))
            case "cut":
                del mutant[at : at + data.draw(st.integers(1, 8))]
            case _:
                mutant[at:at] = data.draw(st.binary(min_size=1, max_size=8))
        if not mutant:
            return
    try:
        header = header_of(bytes(mutant))
    except (InvalidAdapter, TooLarge, UnsupportedMedia):
        return
    assert sum(info.end - info.begin for info in header.values()) == len(mutant) - min(
        i.begin for i in header.values()
    )
