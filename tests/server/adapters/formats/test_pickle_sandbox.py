"""Pickles from tenants: plain tensors come out as safetensors; nothing else happens, whatever they hold."""

import io
import os
import pickle
import socket
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, load_file

from server.adapters.formats import pickle_sandbox_child as unpickle
from server.adapters.formats.pickle_sandbox import PROGRAM, convert_pickle
from server.errors import InvalidAdapter

GOOD = {"a.weight": torch.arange(6.0).view(2, 3), "b": torch.ones(2, dtype=torch.bfloat16)}


def saved(value: Any, **options: Any) -> bytes:
    file = io.BytesIO()
    torch.save(value, file, **options)
    return file.getvalue()


def converted(data: bytes) -> dict[str, torch.Tensor]:
    """By the child's own function, here and without its limits."""
    return load(unpickle.convert(io.BytesIO(data), len(data)))


def test_a_child_converts_plain_tensors(tmp_path: Path) -> None:
    source, destination = tmp_path / "pytorch_adapter.bin", tmp_path / "adapter.safetensors"
    source.write_bytes(saved(GOOD))
    convert_pickle(source, destination)
    found = load_file(destination)
    assert found.keys() == GOOD.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in GOOD.items())


@pytest.mark.parametrize("options", [{}, {"_use_new_zipfile_serialization": False}])
def test_shared_storage_and_views(options: dict[str, Any]) -> None:
    whole = torch.arange(12.0).view(3, 4)
    tensors = {"whole": whole, "again": whole, "view": whole[:, 1], "own": torch.nn.Parameter(whole[0])}
    found = converted(saved(tensors, **options))
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


class Runs:
    """Calls a function when unpickled by whoever lets it."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


HOSTILE: dict[str, Any] = {
    "runs a command": lambda canary: {"a": Runs(os.system, f"touch {canary}")},
    "opens a file": lambda canary: Runs(open, str(canary), "w"),
    "evaluates": lambda canary: Runs(eval, f"open({str(canary)!r}, 'w')"),
    "saves by torch": lambda canary: {"a": Runs(torch.save, {}, str(canary))},
    "loads by torch": lambda canary: {"a": Runs(torch.load, str(canary))},
    "connects": lambda canary: Runs(socket.create_connection, ("127.0.0.1", 9)),
    "exits well": lambda canary: Runs(sys.exit, 0),
    "imports": lambda canary: Runs(__import__, "antigravity"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_pickles_do_nothing(tmp_path: Path, kind: str) -> None:
    canary = tmp_path / "canary"
    value = HOSTILE[kind](canary)
    for data in (
        saved(value),
        pickle.dumps(value, protocol=2),
        saved(value, _use_new_zipfile_serialization=False),
    ):
        with pytest.raises((pickle.UnpicklingError, RuntimeError)):
            converted(data)
        assert not canary.exists()


@pytest.mark.parametrize("kind", ["runs a command", "exits well"])
def test_a_child_with_a_hostile_pickle(tmp_path: Path, kind: str) -> None:
    source, canary = tmp_path / "x.bin", tmp_path / "canary"
    source.write_bytes(saved(HOSTILE[kind](canary)))
    with pytest.raises(InvalidAdapter, match="not a dictionary"):
        convert_pickle(source, tmp_path / "out")
    assert not canary.exists()


def test_what_is_no_plain_tensor_is_refused() -> None:
    odd: list[Any] = [
        {},
        [],
        torch.ones(2),
        {"a": 1},
        {1: torch.ones(2)},
        {"a": {"b": torch.ones(2)}},
        {"a": torch.ones(2, dtype=torch.float64)},
        {"a": torch.ones(2, dtype=torch.int64)},
        {"a": torch.ones(2, 2).to_sparse()},
        {"a": torch.zeros(1).expand(1 << 33)},
        {"a": torch.empty(4, device="meta")},
    ]
    for value in odd:
        with pytest.raises((ValueError, RuntimeError, pickle.UnpicklingError)):
            converted(saved(value))


def test_a_compressed_archive_may_not_swell() -> None:
    source, packed = io.BytesIO(saved({"a": torch.zeros(1 << 22)})), io.BytesIO()
    with zipfile.ZipFile(source) as plain, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in plain.namelist():
            archive.writestr(name, plain.read(name))
    assert len(packed.getvalue()) < 1 << 20
    with pytest.raises((ValueError, RuntimeError)):
        converted(packed.getvalue())


def test_cut_and_flipped_files_are_refused() -> None:
    data = saved(GOOD)
    for cut in range(0, len(data) - 1, 97):
        with pytest.raises((ValueError, RuntimeError, EOFError, pickle.UnpicklingError)):
            converted(data[:cut])


def test_it_ends_in_time(tmp_path: Path) -> None:
    source = tmp_path / "x.bin"
    source.write_bytes(saved(GOOD))
    with pytest.raises(InvalidAdapter, match="within 0 seconds"):
        convert_pickle(source, tmp_path / "out", seconds=0)


@pytest.mark.skipif(sys.platform != "linux", reason="the limits are Linux's")
@pytest.mark.parametrize(
    ("attempt", "error"),
    [
        ("pass", None),
        ("open('/etc/hostname')", "OSError"),
        ("socket.socket()", "OSError"),
        ("bytearray(3 << 30)", "MemoryError"),
        ("while True: pass", ""),
    ],
)
def test_what_the_child_can_no_longer_do(attempt: str, error: str | None) -> None:
    code = (
        "import runpy, socket\n"
        f"inside = runpy.run_path({str(PROGRAM)!r})\n"
        "inside['leave_network'](); inside['limit'](1000, 1)\n"
        f"{attempt}"
    )
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode == 0) == (error is None)
    assert error is None or error in done.stderr
