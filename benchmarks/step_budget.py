"""Where the milliseconds of a decode step go, kernel by kernel, and of which floor.

    python -m benchmarks.step_budget                     # base and LoRA at 16 rows; two minutes
    python -m benchmarks.step_budget --rows 1 --kind base --int8

A step runs as one launch (engine/cpu/recorded_steps.py), which no timer can look into; so each kernel is
timed with the layers run one by one, and what that costs beside the kernels is the line `Python and
launches`. 64 prompt tokens, greedy; medians.
"""

import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.mixed_kinds import publish_kinds
from benchmarks.support.arms import quiet
from benchmarks.support.inputs import make_prompts
from benchmarks.support.machine import measure, work_of
from server.base_model.default_model import ensure_default_model
from server.engine.engine import Engine
from server.kernels.cpu import decode_attention as decode
from server.kernels.cpu import float32_linear as linear
from server.kernels.cpu import grouped_affine as affine
from server.kernels.cpu import llama_ops as elementwise
from server.kernels.cpu.int8 import linear as int8
from server.kernels.cpu.int8 import vnni_linear as int8_dot
from server.messages import AdapterRef, Generate, Sampling
from server.settings import Settings

CACHE = Path(__file__).resolve().parents[1] / ".cache"
PROMPT, NEW = 64, 32
Seconds = dict[str, float]  # by kernel
KERNELS: dict[str, tuple[Any, str]] = {
    "linears": (linear, "_linear"),
    "linears in int8": (int8, "_linear"),
    "linears by bytes": (int8_dot, "_linear"),
    "adapters": (affine, "_grouped_affine"),
    "attention": (decode, "_decode_attention"),
    "norms": (elementwise, "_rms_norm"),
    "rotary embedding": (elementwise, "_rotate"),
    "SiLU": (elementwise, "_silu_times"),
    "sums": (elementwise, "_add"),
}


@dataclass
class Spent:
    """Seconds of steps in which all rows decode, of all prefill, and in each kernel."""

    steps: list[float] = field(default_factory=list)
    prefill: list[float] = field(default_factory=list)
    kernels: Seconds = field(default_factory=lambda: defaultdict(float))

    @property
    def step(self) -> float:
        return statistics.median(self.steps)


def main(
    rows: int = 16,
    kind: Annotated[
        list[str] | None,
        typer.Option(help="base, lora, bottleneck, prefix, prompt, bitfit; the first two unless given."),
    ] = None,
    repeats: int = 3,
    threads: int = 2,
    int8_base: Annotated[bool, typer.Option("--int8", help="The base's linears in int8.")] = False,
) -> None:
    """Measure and print."""
    quiet()
    folder = ensure_default_model(CACHE)
    machine = measure(threads)
    with tempfile.TemporaryDirectory(prefix="polypeft-budget-") as scratch:
        own = Settings(
            data_dir=Path(scratch) / "data",
            threads=threads,
            quantize="int8" if int8_base else "none",
            prefix_cache=False,
            lookup_tokens=0,
        )
        engine = Engine(own, folder)
        adapters = publish_kinds(engine, folder, Path(scratch), rows)
        prompts = make_prompts(folder, rows, PROMPT)
        spent: dict[str, tuple[Spent, Spent]] = {}
        held: dict[str, int] = {}  # bytes of the adapters
        for name in kind or ["base", "lora"]:
            before = engine.cache.nbytes
            refs = [None] * rows if name == "base" else [*adapters[name]]
            spent[name] = measured(engine, prompts, refs, repeats)
            held[name] = engine.cache.nbytes - before
        engine.close()
    shown = Table("", *spent, title=f"ms of a step, {rows} rows; {machine.processor}")
    one, by_layer = ({name: pair[i] for name, pair in spent.items()} for i in (0, 1))
    shown.add_row("as one launch", *(f"{1e3 * s.step:.1f}" for s in one.values()))
    shown.add_row("layer by layer", *(f"{1e3 * s.step:.1f}" for s in by_layer.values()))
    for label in KERNELS:
        shown.add_row(
            f"  {label}", *(f"{1e3 * s.kernels[label] / len(s.steps):.1f}" for s in by_layer.values())
        )
    rest = [s.step - sum(s.kernels.values()) / len(s.steps) for s in by_layer.values()]
    shown.add_row("  Python and launches", *(f"{1e3 * seconds:.1f}" for seconds in rest))
    whole = (1 if int8_base else 4) * work_of(folder).parameters
    floors = [(whole + held[name]) / (machine.read_gb_per_s * 1e9) for name in spent]
    shown.add_row("bytes of all weights, read once", *(f"{1e3 * seconds:.1f}" for seconds in floors))
    shown.add_row("prefill of all rows", *(f"{1e3 * statistics.median(s.prefill):.0f}" for s in one.values()))
    Console().print(shown)


def measured(
    engine: Engine, prompts: list[list[int]], refs: Sequence[AdapterRef | None], repeats: int
) -> tuple[Spent, Spent]:
    """As one launch, and layer by layer with each kernel timed. A first round of each does not count."""
    whole, layers = Spent(), Spent()
    for repeat in range(-1, repeats):
        drive(engine, prompts, refs, whole if repeat >= 0 else Spent(), defaultdict(float))
        with timed(engine) as now:
            drive(engine, prompts, refs, layers if repeat >= 0 else Spent(), now)
    return whole, layers


@contextmanager
def timed(engine: Engine) -> Iterator[Seconds]:
    """Layers run one by one; yields the seconds that each kernel has taken."""
    assert engine.model.decoder is not None, "this model's layers run by our kernels"
    now: Seconds = defaultdict(float)

    def timing(label: str, launch: Callable[..., None]) -> Callable[..., None]:
        def timed_launch(*args: Any, **options: Any) -> None:
            start = time.perf_counter()
            launch(*args, **options)
            now[label] += time.perf_counter() - start

        return timed_launch

    own = {label: getattr(module, name) for label, (module, name) in KERNELS.items()}
    recorded_steps, run = engine.model.decoder.recorded_steps, engine.model.decoder.recorded_steps.run
    recorded_steps.run = lambda *_: None  # type: ignore[method-assign]
    try:
        for label, (module, name) in KERNELS.items():
            setattr(module, name, timing(label, own[label]))
        yield now
    finally:
        recorded_steps.run = run  # type: ignore[method-assign]
        for label, (module, name) in KERNELS.items():
            setattr(module, name, own[label])


def drive(
    engine: Engine,
    prompts: list[list[int]],
    refs: Sequence[AdapterRef | None],
    spent: Spent,
    now: Seconds,
) -> None:
    sampling = Sampling(max_tokens=NEW, temperature=0.0, ignore_eos=True)
    for i, (prompt, ref) in enumerate(zip(prompts, refs, strict=True)):
        engine.submit(Generate(str(i), "tenant", prompt, sampling, ref))
    prefill = 0.0
    while engine.busy:
        now.clear()
        start = time.perf_counter()
        chunks = engine.step()
        seconds = time.perf_counter() - start
        if not chunks and not engine.scheduler.running:
            time.sleep(0.0005)  # an adapter is on its way
            continue
        step = engine.model.step
        if step.in_place == len(prompts) and not step.chunks:
            spent.steps.append(seconds)
            for label, own in now.items():
                spent.kernels[label] += own
        else:
            prefill += seconds
    spent.prefill.append(prefill)


if __name__ == "__main__":
    typer.run(main)
