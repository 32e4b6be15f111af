"""What this machine can do at best, measured in the same run, and the floor that implies for a job."""

import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from torch import nn

PACKAGES = ("torch", "transformers", "peft")


@dataclass(frozen=True)
class Machine:
    name: str
    processor: str
    cores: int
    threads: int
    instructions: str  # torch's name for the vector instructions it uses
    read_gb_per_s: float
    sgemm_gflop_per_s: float
    versions: dict[str, str]


@dataclass(frozen=True)
class Work:
    """What one token costs in a model: parameters of its linear layers, and of the head alone."""

    parameters: int
    head_parameters: int


def measure(threads: int) -> Machine:
    """Takes about two seconds on `threads` threads; the best of several tries, as a bound should be."""
    torch.set_num_threads(threads)
    data = torch.ones(64 << 20)  # 256 MiB, more than any cache here
    a, b = torch.rand(1536, 1536), torch.rand(1536, 1536)
    return Machine(
        name=platform.node(),
        processor=_processor(),
        cores=os.cpu_count() or 1,
        threads=threads,
        instructions=torch.backends.cpu.get_cpu_capability(),
        read_gb_per_s=data.nbytes / _best(data.sum) / 1e9,
        sgemm_gflop_per_s=2 * 1536**3 / _best(lambda: a @ b) / 1e9,
        versions={"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
    )


def work_of(model: Path) -> Work:
    """Counted on a model without weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model, local_files_only=True))
    linears = [module for module in empty.modules() if isinstance(module, nn.Linear)]
    head = empty.get_output_embeddings().weight.numel()
    return Work(sum(linear.weight.numel() for linear in linears), head)


def floor_seconds(
    machine: Machine, work: Work, *, rows: int, prompt: int, new: int, adapter_parameters: int = 0
) -> float:
    """The least time a job of fp32 rows can take here: linears only, attention and all else for nothing.

    `adapter_parameters` are one adapter's; each row has its own. Every step reads all weights once.
    """
    flops, bandwidth = machine.sgemm_gflop_per_s * 1e9, machine.read_gb_per_s * 1e9
    step_bytes = 4 * (work.parameters + rows * adapter_parameters)
    step_flops = 2 * rows * (work.parameters + adapter_parameters)
    prefill_flops = 2 * rows * prompt * (work.parameters - work.head_parameters + adapter_parameters)
    prefill = max((prefill_flops + 2 * rows * work.head_parameters) / flops, step_bytes / bandwidth)
    return prefill + (new - 1) * max(step_flops / flops, step_bytes / bandwidth)


def _best(call: Callable[[], object], seconds: float = 1.0) -> float:
    call()
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return best


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
