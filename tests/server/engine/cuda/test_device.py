"""On CUDA: what Triton must compile at its first launch is tried at the start. None of it needs a GPU."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.fixtures.gpu import needs_triton

pytestmark = needs_triton

# What a start on a machine with a CUDA device says, of each line of variables in a process of its own
PLACE = """
import json, os, sys, torch
from server.engine.model.placement import choose_placement
from server.errors import StartupError
from server.settings import Settings

torch.cuda.is_available = lambda: True
for line in sys.stdin:
    if os.fork():
        os.wait()
        continue
    os.environ.update(json.loads(line))
    said = "died"
    try:
        said = str(choose_placement(Settings(device="cuda")).device)
    except StartupError as error:
        said = f"{error.param} {error}"
    finally:
        print(said, flush=True)
        os._exit(0)
"""
REFUSED = "device Triton's kernels need a C compiler and Python's headers"
Placed = Callable[..., str]


@pytest.fixture(scope="module")
def placed() -> Iterator[Placed]:
    """variables -> what the start says, where the compiler is what these name; torch is imported once."""
    own = {name: value for name, value in os.environ.items() if name not in {"CC", "TRITON_INTERPRET"}}
    command = [sys.executable, "-c", PLACE]
    with subprocess.Popen(
        command, env=own, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        tell, hear = process.stdin, process.stdout

        def place(**variables: str) -> str:
            tell.write(json.dumps(variables) + "\n")
            tell.flush()
            return hear.readline().rstrip()

        yield place
        tell.close()
    assert process.returncode == 0


@pytest.fixture
def compiler(tmp_path: Path) -> Path:
    """A program in a compiler's place: it keeps what it was asked for beside it, and succeeds."""
    path = tmp_path / "cc"
    path.write_text('#!/bin/sh\necho "$@" >"$0.asked"\n')
    path.chmod(0o700)
    return path


def test_without_a_compiler_the_start_is_refused(placed: Placed, tmp_path: Path) -> None:
    assert placed(PATH=str(tmp_path)).startswith(REFUSED)
    assert placed(CC=str(tmp_path / "none")).startswith(REFUSED)


def test_a_compiler_that_fails_is_none(placed: Placed, compiler: Path) -> None:
    """As one does that finds no Python.h."""
    compiler.write_text("#!/bin/sh\nexit 1\n")
    assert placed(CC=str(compiler)).startswith(REFUSED)


def test_tritons_own_driver_is_what_is_compiled(placed: Placed, compiler: Path) -> None:
    assert placed(CC=str(compiler)) == "cuda"
    asked = compiler.with_name("cc.asked").read_text()
    assert "nvidia/driver.c" in asked
    assert f"include/python3.{sys.version_info.minor}" in asked
