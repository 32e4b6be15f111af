"""On CUDA: what Triton must compile at its first launch is tried at the start. None of it needs a GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fixtures.gpu import needs_triton

pytestmark = needs_triton

PLACE = """
import torch
from server.engine.model.placement import choose_placement
from server.errors import StartupError
from server.settings import Settings

torch.cuda.is_available = lambda: True
try:
    print(choose_placement(Settings(device="cuda")).device)
except StartupError as error:
    print(error.param, error)
"""
REFUSED = "device Triton's kernels need a C compiler and Python's headers"


def placed(**environment: str) -> str:
    """What a start on a machine with a CUDA device says, where the compiler is what these variables name."""
    own = {name: value for name, value in os.environ.items() if name not in {"CC", "TRITON_INTERPRET"}}
    command = [sys.executable, "-c", PLACE]
    done = subprocess.run(command, env=own | environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def compiler(tmp_path: Path) -> Path:
    """A program in a compiler's place: it keeps what it was asked for beside it, and succeeds."""
    path = tmp_path / "cc"
    path.write_text('#!/bin/sh\necho "$@" >"$0.asked"\n')
    path.chmod(0o700)
    return path


def test_without_a_compiler_the_start_is_refused(tmp_path: Path) -> None:
    assert placed(PATH=str(tmp_path)).startswith(REFUSED)
    assert placed(CC=str(tmp_path / "none")).startswith(REFUSED)


def test_a_compiler_that_fails_is_none(tmp_path: Path, compiler: Path) -> None:
    """As one does that finds no Python.h."""
    compiler.write_text("#!/bin/sh\nexit 1\n")
    assert placed(CC=str(compiler)).startswith(REFUSED)


def test_tritons_own_driver_is_what_is_compiled(compiler: Path) -> None:
    assert placed(CC=str(compiler)) == "cuda\n"
    asked = compiler.with_name("cc.asked").read_text()
    assert "nvidia/driver.c" in asked
    assert f"include/python3.{sys.version_info.minor}" in asked
