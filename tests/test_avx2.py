"""The tests' second face: that it hides what it says, that users get the same by it, and how CI ends."""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from server.kernels.cpu.openmp import AVAILABLE
from tests.avx2 import PATHS, UP_TO_AVX2, masked_environment

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
    assert not [name for name in found["ours"] if name.startswith(("avx512", "avxvnni", "amx"))]
    assert (found["int8"], found["wide"], found["zmm"]) == ("Int8Linear", False, False)


def test_what_a_user_sees_holds_without_avx512() -> None:
    command = [sys.executable, "-m", "tests.avx2", "-p", "no:cacheprovider", *SEEN]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_the_paths_are_there() -> None:
    assert all((ROOT / path).exists() for path in PATHS)


@pytest.mark.parametrize(("failing", "status"), [("", 0), ("test", 1), ("test-avx2", 1)])
def test_ci_ends_with_both_faces_and_fails_with_either(tmp_path: Path, failing: str, status: int) -> None:
    """Over a `make` that runs no test."""
    make = tmp_path / "make"
    make.write_text(f"""#!/bin/sh
case "$1" in
  lint) exit 0 ;;
  {failing or "none"}) echo "1 failed, 2 passed in 3.00s"; echo "make: Error 1"; exit 2 ;;
  *) echo "3 passed in 4.00s" ;;
esac
""")
    make.chmod(0o700)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(
        [ROOT / ".ci" / "run"], env=environment, capture_output=True, text=True, check=False
    )
    lines = {
        target: "1 failed, 2 passed in 3.00s" if target == failing else "3 passed in 4.00s"
        for target in ("test", "test-avx2")
    }
    assert done.stdout.splitlines()[-2:] == [f"{target:<10} {line}" for target, line in lines.items()]
    assert done.returncode == status
