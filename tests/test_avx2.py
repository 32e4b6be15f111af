"""The tests' second face: that it hides what it says, that users get the same by it, and how CI ends."""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from server.kernels.cpu.openmp import AVAILABLE
from tests import avx2
from tests.avx2 import HIDING, PATHS, UP_TO_AVX2, masked_environment

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.skipif(
    not AVAILABLE or platform.machine() != "x86_64", reason="hides instructions of an x86 from our kernels"
)
LOOK = """
import json, numba, torch
from numpy._core._multiarray_umath import __cpu_dispatch__, __cpu_features__
from server.kernels.cpu.int8.vnni_linear import FASTEST_INT8
from server.kernels.cpu.llvm_tiles import FEATURES, HAS_AVX512

@numba.njit(fastmath=True)
def sums(x):
    return (x * x).sum()

sums(torch.ones(64).numpy())
print(json.dumps({
    "torch": torch.backends.cpu.get_cpu_capability(),
    "numpy": [name for name in __cpu_dispatch__ if __cpu_features__[name]],
    "ours": [name for name, here in FEATURES.items() if here],
    "int8": FASTEST_INT8.__name__,
    "wide": HAS_AVX512,
    "zmm": "zmm" in "".join(sums.inspect_asm().values()),
}))
"""
# float32 and int8 as a user has them, by kernels and by an engine
SEEN = (
    "tests/server/kernels/cpu/test_float32_linear.py",
    "tests/server/kernels/cpu/test_int8.py",
    "tests/server/engine/cpu/test_decoder_layers.py",
)


def test_nothing_beyond_avx2_is_left() -> None:
    command = [sys.executable, "-W", "error", "-c", LOOK]
    done = subprocess.run(
        command, cwd=ROOT, env=masked_environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["torch"] in {"AVX2", "DEFAULT"}
    assert set(found["numpy"]) <= UP_TO_AVX2
    assert "avx2" in found["ours"]
    assert not [name for name in found["ours"] if name.startswith(avx2.WIDER)]
    assert (found["int8"], found["wide"], found["zmm"]) == ("Int8Linear", False, False)


@pytest.mark.skipif(not avx2.has_more_than_avx2(), reason="it would run the same tests a second time")
def test_what_a_user_sees_holds_without_avx512() -> None:
    command = [sys.executable, "-m", "tests.avx2", "-p", "no:cacheprovider", *SEEN]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_the_paths_are_there() -> None:
    for path in PATHS + HIDING:
        file, _, name = path.partition("::")
        assert (ROOT / file).exists(), path
        assert not name or f"def {name}(" in (ROOT / file).read_text(), path


@pytest.mark.parametrize(("more", "paths"), [(True, PATHS), (False, (*HIDING, "-n0"))])
def test_where_nothing_is_hidden_only_the_hiding_is_tested(
    more: bool, paths: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    became: list[list[str]] = []
    monkeypatch.setattr(avx2, "has_more_than_avx2", lambda: more)
    monkeypatch.setattr(os, "execve", lambda _program, arguments, _environment: became.append(arguments))
    avx2.main(["-x"])
    avx2.main(["-x", "tests/test_avx2.py"])
    assert became[0][4:] == [*paths]
    assert became[1][4:] == ["tests/test_avx2.py"]
    assert ("ends at AVX2" in capsys.readouterr().err) is not more


def test_whether_there_is_more_is_what_the_libraries_say() -> None:
    look = [sys.executable, "-c", LOOK]
    done = subprocess.run(look, cwd=ROOT, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    beyond = [name for name in found["ours"] if name.startswith(avx2.WIDER)]
    assert avx2.has_more_than_avx2() == bool(beyond or set(found["numpy"]) - UP_TO_AVX2)


def run_ci(folder: Path, make: str) -> "subprocess.CompletedProcess[str]":
    """CI over these lines of sh in the place of `make`."""
    (folder / "make").write_text(f"#!/bin/sh\n{make}")
    (folder / "make").chmod(0o700)
    environment = os.environ | {"PATH": f"{folder}:{os.environ['PATH']}"}
    return subprocess.run(
        [ROOT / ".ci" / "run"], env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize(("failing", "status"), [("", 0), ("test", 1), ("test-avx2", 1)])
def test_ci_ends_with_both_faces_and_fails_with_either(tmp_path: Path, failing: str, status: int) -> None:
    make = f"""case "$1" in
  {failing or "none"}) echo "1 failed, 2 passed in 3.00s"; echo "make: Error 1"; exit 2 ;;
  test*) echo "3 passed in 4.00s" ;;
esac
"""
    done = run_ci(tmp_path, make)
    lines = {
        target: "1 failed, 2 passed in 3.00s" if target == failing else "3 passed in 4.00s"
        for target in ("test", "test-avx2")
    }
    assert done.stdout.splitlines()[-2:] == [f"{target:<10} {line}" for target, line in lines.items()]
    assert done.returncode == status


@pytest.mark.parametrize("failing", ["install", "lint", "kernels"])
def test_ci_tests_nothing_where_what_comes_before_fails(tmp_path: Path, failing: str) -> None:
    done = run_ci(tmp_path, f'echo "made $1"; [ "$1" != {failing} ]')
    assert done.returncode != 0
    assert f"made {failing}" in done.stdout
    assert "made test" not in done.stdout
