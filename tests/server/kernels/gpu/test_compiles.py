import os
import subprocess
import sys
from pathlib import Path

from tests.fixtures.gpu import needs_triton

ROOT = Path(__file__).resolve().parents[4]


@needs_triton
def test_every_kernel_compiles_for_hopper_without_one(tmp_path: Path) -> None:
    """In a process of its own: in this one kernels may be the interpreter's."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "TRITON_DEFAULT_FP_FUSION": "1"}
    command = [sys.executable, "-m", "tests.server.kernels.gpu.compile_triton", "90"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
