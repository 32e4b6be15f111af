"""Converts weights in torch's pickle format to safetensors, in a sandboxed child process.

The child (pickle_sandbox_child.py) has no environment, no arguments from tenants, and no file but its
standard input and output. Its memory, processor time and file sizes are limited. It has no network where the
system lets an unprivileged process give it up (user namespaces); elsewhere the limits and torch's
weights_only unpickler are the protection. Its output is checked like any upload.
"""

import subprocess
import sys
from pathlib import Path

from server.errors import InvalidAdapter

# Names of AdapterHub's and PEFT's pickle files -> names of the converted files.
PICKLES = {
    "pytorch_adapter.bin": "adapter.safetensors",
    "adapter_model.bin": "adapter_model.safetensors",
}
SECONDS = 60
PROGRAM = Path(__file__).with_name("pickle_sandbox_child.py")


def convert_pickle(source: Path, destination: Path, *, seconds: int = SECONDS) -> None:
    """Convert a file; blocking. Raises InvalidAdapter if it is no dictionary of tensors, or is slow."""
    command = [sys.executable, "-I", "-B", str(PROGRAM), str(seconds)]
    with source.open("rb") as pickled, destination.open("wb") as converted:
        try:
            done = subprocess.run(
                command,
                stdin=pickled,
                stdout=converted,
                stderr=subprocess.DEVNULL,
                env={},
                cwd="/",
                timeout=seconds,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise InvalidAdapter(
                f"The .bin file could not be converted within {seconds} seconds; send safetensors.",
                param="files",
            ) from error
    if done.returncode != 0:
        raise InvalidAdapter(
            "The .bin file is not a dictionary of float32, float16 or bfloat16 tensors; send safetensors.",
            param="files",
        )
