"""Choose where the model runs and in which number formats, from the settings and the machine."""

import os
import tempfile
from pathlib import Path
from subprocess import CalledProcessError

import torch

from server.engine.model.base_model import Placement
from server.errors import StartupError
from server.kernels import token_blocks as gpu
from server.kernels.weight_formats import weight_format_of
from server.settings import Settings


def choose_placement(settings: Settings) -> Placement:
    """CUDA in bfloat16 if there is a device, else a CPU in float32 (AVX2 has no fast bfloat16), unless the
    settings say otherwise.

    Also sets how many threads torch's operators and our kernels use. Raises StartupError for settings that
    this machine cannot meet.
    """
    cuda = torch.cuda.is_available()
    if settings.device == "cuda" and not cuda:
        raise StartupError("--device cuda was asked for, but torch finds no CUDA device.", param="device")
    device = torch.device("cuda" if cuda and settings.device != "cpu" else "cpu")
    if gpu.uses_triton(device):
        check_compiler()
    dtype = (
        settings.dtype if settings.dtype != "auto" else ("bfloat16" if device.type == "cuda" else "float32")
    )
    weight_format = weight_format_of(settings.quantize)
    if weight_format.rounds and not weight_format.runs_on(device, getattr(torch, dtype)):
        raise StartupError(
            f"--quantize {settings.quantize} needs {weight_format.needs}; here is {device.type}, {dtype}.",
            param="quantize",
        )
    torch.set_num_threads(settings.threads or len(os.sched_getaffinity(0)))
    lora_bfloat16 = settings.lora_dtype == "bfloat16"
    return Placement(device, getattr(torch, dtype), weight_format, lora_bfloat16=lora_bfloat16)


def check_compiler() -> None:
    """Compile the C part of Triton's driver, as Triton does at its first launch, and discard the result.

    Raises StartupError where there is no C compiler (CC, else gcc or clang on the PATH) or no Python.h.
    """
    from triton.backends.nvidia import driver
    from triton.runtime.build import _build

    source = Path(driver.__file__).with_name("driver.c")
    with tempfile.TemporaryDirectory() as folder:
        try:
            _build("cuda_utils", str(source), folder, [], driver.include_dirs, [], [])
        except (RuntimeError, OSError, CalledProcessError) as error:
            raise StartupError(
                "Triton's kernels need a C compiler and Python's headers, and here its driver cannot be "
                "compiled: install gcc, libc6-dev and python3-dev, or name a compiler in CC.",
                param="device",
            ) from error
