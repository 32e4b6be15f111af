"""Weights in torch's pickle format, converted to safetensors in a child process that can do nothing else.

What the child does is in pickle_sandbox_child.py. It has no environment, no arguments from tenants, no file
but its standard input and output; limits on memory, processor time and file sizes; and no network where the
system lets an unprivileged process give it up (user namespaces; elsewhere torch's weights_only unpickler and
the limits are what stands). Its result is then read as suspiciously as any upload.
"""

import subprocess
import sys
from pathlib import Path

from server.errors import InvalidAdapter

# What AdapterHub and PEFT call theirs -> what the converted file is called.
PICKLES = {
    "pytorch_adapter.bin": "adapter.safetensors",
    "adapter_model.bin": "adapter_model.safetensors",
}
SECONDS = 60
PROGRAM = Path(__file__).with_name("pickle_sandbox_child.py")


def convert_pickle(source: Path, destination: Path, *, seconds: int = SECONDS) -> None:
    """Blocking. Raises InvalidAdapter if the file is no plain dictionary of tensors, or takes too long."""
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
