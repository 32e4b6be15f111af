"""What __main__.py is made of: a random model, random adapters, an engine that steps, a clock."""

import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from itertools import count
from pathlib import Path
from typing import Any

import torch

from benchmarks.support.inputs import LINEARS, RANK
from server.adapters.methods.affine_layout import TensorPiece
from server.adapters.methods.interface import Packed
from server.engine.engine import Engine
from server.engine.model import base_model as frozen
from server.messages import AdapterRef, Generate, Sampling
from server.settings import Settings

ROOT = Path(__file__).resolve().parents[2]
TESTS = ("tests/server/kernels", "tests/server/engine/cuda/test_engine.py")
TEST_SECONDS = 240
GIB = 1 << 30

LLAMA_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
}
TINY_LLAMA = LLAMA_8B | {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 300,
    "max_position_embeddings": 512,
}

_names = count()


class Clock:
    """Seconds until the device is done."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def best(self, call: Callable[[], object], seconds: float = 0.5) -> float:
        """The least of several calls; the first is not counted."""
        call()
        best, end = float("inf"), time.perf_counter() + seconds
        while best == float("inf") or time.perf_counter() < end:
            self.wait()
            start = time.perf_counter()
            call()
            self.wait()
            best = min(best, time.perf_counter() - start)
        return best


def run_tests(device: torch.device) -> dict[str, Any]:
    """The kernels' tests, as on any machine; on a GPU they run there. pytest's last line, and the seconds."""
    start = time.perf_counter()
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *TESTS]
    try:
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=TEST_SECONDS, check=False
        )
        lines = done.stdout.strip().splitlines() or done.stderr.strip().splitlines() or [""]
        result: dict[str, Any] = {"passed": done.returncode == 0, "said": lines[-1]}
        if done.returncode:
            result["failures"] = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    except subprocess.TimeoutExpired:
        result = {"passed": False, "said": f"not done after {TEST_SECONDS} s"}
    return result | {"on": device.type, "seconds": round(time.perf_counter() - start, 1)}


def write_config(folder: Path, *, tiny: bool) -> None:
    """A Llama's config; weights there are none."""
    from transformers import GenerationConfig, LlamaConfig

    shape: dict[str, Any] = TINY_LLAMA if tiny else LLAMA_8B
    LlamaConfig(**shape, bos_token_id=0, eos_token_id=0, tie_word_embeddings=False).save_pretrained(folder)
    GenerationConfig(eos_token_id=0).save_pretrained(folder)


def random_model(folder: Path, device: torch.device) -> Any:
    """A model of the folder's config with weights drawn on the device, in the dtype that serves there."""
    from transformers import AutoConfig, AutoModelForCausalLM

    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    with torch.device(device):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def make_engine(folder: Path, device: torch.device, *, rows: int, tiny: bool) -> Engine:
    """Our engine over a random model. Its weights' digest is not taken: it would be a minute of hashing."""

    settings = Settings(
        data_dir=folder / "data",
        device="cuda" if device.type == "cuda" else "cpu",
        max_seqs=rows,
        max_batch_tokens=1 << 16,
        max_model_len=256 if tiny else 4096,
        kv_bytes=(8 << 20) if tiny else 8 * GIB,
        prefix_cache=False,
        adapter_slots=2 * rows,
        adapter_device_bytes=16 * GIB,
    )
    before = frozen.load_base, frozen.FrozenModel.digest
    frozen.load_base = lambda folder, placement: random_model(folder, placement.device)
    frozen.FrozenModel.digest = lambda self: "0" * 64  # type: ignore[method-assign] # noqa: ARG005
    try:
        return Engine(settings, folder / "model")
    finally:
        frozen.load_base, frozen.FrozenModel.digest = before  # type: ignore[method-assign]


def make_packed(engine: Engine, seed: int) -> Packed:
    """A LoRA of RANK on all linears of the layers, random, as the loader would bring it."""
    placement = engine.model.placement
    sites = [
        site
        for site in engine.base.sites.values()
        if site.kind == "linear" and site.name.endswith(tuple(LINEARS))
    ]
    pieces = [
        TensorPiece(site.name, part, (RANK, width))
        for site in sites
        for part, width in (("a", site.inputs), ("b", site.outputs))
    ]
    generator = torch.Generator(placement.device).manual_seed(seed)
    total = sum(piece.shape[0] * piece.shape[1] for piece in pieces)
    drawn = torch.randn(total, generator=generator, device=placement.device) * 0.02
    flat = drawn.to(placement.dtype).cpu()
    return Packed(flat.pin_memory() if placement.device.type == "cuda" else flat, pieces, summable=True)


def offer(engine: Engine, adapters: Sequence[Packed]) -> list[AdapterRef]:
    """References under which rows may name them; they are brought to the device by the first that does."""
    refs = []
    for i, packed in enumerate(adapters):
        ref = AdapterRef("tenant", f"a{i}", 1, f"digest-{i}", "lora", f"a{i}")
        loaded: Future[Packed] = Future()
        loaded.set_result(packed)
        engine.cache.add_pending(ref, loaded)
        refs.append(ref)
    return refs


def seconds_of_steps(
    engine: Engine, uses: Sequence[AdapterRef | None], prompt: int, steps: int
) -> list[float]:
    """A row each, until all have their first token; then so many decode steps, in seconds each.

    With no steps to decode: of the step that takes all prompts.
    """
    generator = torch.Generator().manual_seed(0)
    sampling = Sampling(max_tokens=steps + 2 if steps else 1, temperature=0.0, ignore_eos=True, seed=0)
    for use in uses:
        ids = torch.randint(engine.base.vocab_size, (prompt,), generator=generator).tolist()
        engine.submit(Generate(f"row-{next(_names)}", "tenant", ids, sampling, use))
    seconds: list[float] = []
    while engine.busy:
        start = time.perf_counter()
        engine.step()  # ends when the sampled tokens are on the host
        seconds.append(time.perf_counter() - start)
    assert len(seconds) >= max(steps, 1), "rows did not run together"
    return seconds[-steps:] if steps else [max(seconds)]


def rate_of_churn(engine: Engine, uses: Sequence[AdapterRef | None], prompt: int, longest: int) -> float:
    """New tokens per second while rows come as others end: two for each use, `longest` tokens at most."""
    generator = torch.Generator().manual_seed(1)
    waiting = []
    for use in [*uses, *uses]:
        ids = torch.randint(engine.base.vocab_size, (prompt,), generator=generator).tolist()
        new = int(torch.randint(max(1, longest // 4), longest + 1, (), generator=generator))
        sampling = Sampling(max_tokens=new, temperature=0.0, ignore_eos=True, seed=0)
        waiting.append(Generate(f"row-{next(_names)}", "tenant", ids, sampling, use))
    total, running, start = 0, 0, time.perf_counter()
    while waiting or engine.busy:
        while waiting and running < len(uses):
            engine.submit(waiting.pop())
            running += 1
        for chunk in engine.step():
            total += len(chunk.tokens)
            running -= chunk.finish is not None
    return total / (time.perf_counter() - start)


@torch.inference_mode()
def try_peft(model: Any, ids: torch.Tensor, linears: list[str], rank: int, clock: Clock) -> float:
    """Seconds of a decode step of PEFT's mixed batch, an adapter a row. OutOfMemoryError: it does not fit."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=rank, target_modules=linears, init_lora_weights=False, task_type="CAUSAL_LM")
    adapted: Any = get_peft_model(model, config, adapter_name="0", autocast_adapter_dtype=False)
    for i in range(1, ids.shape[0]):
        adapted.add_adapter(str(i), config)
    adapted.to(clock.device, model.dtype).eval()
    names = [str(i) for i in range(ids.shape[0])]

    def generate(new: int) -> float:
        clock.wait()
        start = time.perf_counter()
        adapted.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            adapter_names=names,
            do_sample=False,
            min_new_tokens=new,
            max_new_tokens=new,
            pad_token_id=0,
        )
        clock.wait()
        return time.perf_counter() - start

    generate(2)
    few, many = 2, 10
    return (generate(many) - generate(few)) / (many - few)
