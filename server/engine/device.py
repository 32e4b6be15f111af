"""Where the model runs, and in which dtype."""

import os

import torch

from server.engine.frozen import Placement
from server.errors import StartupError
from server.kernels.openmp import AVAILABLE
from server.settings import Settings


def choose_placement(settings: Settings) -> Placement:
    """CPU in float32 (AVX2 has no fast bfloat16), CUDA in bfloat16, unless told otherwise.

    Also sets how many threads torch's operators and our kernels use.
    """
    cuda = torch.cuda.is_available()
    if settings.device == "cuda" and not cuda:
        raise StartupError("--device cuda was asked for, but torch finds no CUDA device.", param="device")
    device = torch.device("cuda" if cuda and settings.device != "cpu" else "cpu")
    wanted = (
        settings.dtype if settings.dtype != "auto" else ("bfloat16" if device.type == "cuda" else "float32")
    )
    if settings.quantize == "int8" and (device.type != "cpu" or wanted != "float32" or not AVAILABLE):
        rule = "needs a CPU, float32, and numba with torch's own libgomp"
        raise StartupError(f"--quantize int8 {rule}; here is {device.type}, {wanted}.", param="quantize")
    torch.set_num_threads(settings.threads or len(os.sched_getaffinity(0)))
    return Placement(
        device,
        getattr(torch, wanted),
        "int8" if settings.quantize == "int8" else "float32",
        rounded=settings.lora_dtype == "bfloat16",
    )
