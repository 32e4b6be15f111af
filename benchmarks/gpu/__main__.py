"""One GPU: are the kernels right, and how far from what the device can do are decode, prefill and swaps.

    python -m benchmarks.gpu                       # an 8B-shaped Llama, random weights; under ten minutes
    python -m benchmarks.gpu --device cpu --tiny   # does it run at all; its figures mean nothing

Needs no network. Weights are made on the device. Floors come from bandwidths measured in the same run: a
decode step reads all weights but the embedding once, each row's K and V, and each distinct adapter.
Arms, with the next step begun ahead and without, take turns within each repeat; medians are shown.
"""

import json
import tempfile
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.gpu.parts import (
    Clock,
    make_engine,
    make_packed,
    offer,
    rate_of_churn,
    run_tests,
    seconds_of_steps,
    try_peft,
    write_config,
)
from benchmarks.support.arms import quiet
from benchmarks.support.inputs import LINEARS, RANK
from server.adapters.methods.interface import Packed
from server.engine.engine import Engine
from server.messages import AdapterRef


@dataclass(frozen=True)
class Job:
    rows: int = 32
    prompt: int = 128
    steps: int = 40  # timed decode steps of a turn
    repeats: int = 3
    copy_bytes: int = 2 << 30  # of what bandwidth is measured with


TINY = Job(rows=3, prompt=12, steps=4, repeats=1, copy_bytes=4 << 20)


@dataclass
class Figures:
    """Seconds, bytes and ratios. Ratios are of the same run; None: not measured."""

    device: str
    date: str
    job: Job
    tests: dict[str, Any] = field(default_factory=dict)
    read_gb_per_s: float = 0.0
    pinned_gb_per_s: float = 0.0
    weight_bytes: int = 0
    adapter_bytes: int = 0
    kv_bytes_read: int = 0
    base_step: float = 0.0
    lora_step: float = 0.0
    apart: dict[str, float] = field(default_factory=dict)  # a step, where none is begun ahead
    churn: dict[str, float] = field(default_factory=dict)  # LoRA tokens/s while rows come and go, by arm
    replay: dict[str, float] = field(default_factory=dict)  # a step's graph alone, no host in between
    replayed: float = 0.0  # share of the timed decode steps that were graphs
    prefill: float = 0.0
    prefill_lora: float = 0.0
    transformers_prefill: float = 0.0
    swap: float = 0.0
    peft_step: float | None = None
    peft_note: str = ""

    @property
    def floor(self) -> float:
        return (self.weight_bytes + self.kv_bytes_read) / (self.read_gb_per_s * 1e9)

    def ratios(self) -> dict[str, tuple[float, float]]:
        """What matters: (reached, wanted)."""
        bound = self.weight_bytes / (self.weight_bytes + self.job.rows * self.adapter_bytes)
        found = {
            "base rows: floor / step": (self.floor / self.base_step, 0.8),
            "LoRA rows / base rows": (self.base_step / self.lora_step, 0.9 * bound),
            "LoRA rows / base rows / W/(W+nA)": (self.base_step / self.lora_step / bound, 0.9),
            "prefill / transformers' forward": (self.transformers_prefill / self.prefill, 1.0),
            "swap / pinned copy": (self.adapter_bytes / self.swap / (self.pinned_gb_per_s * 1e9), 0.85),
        }
        if self.peft_step:
            found["LoRA rows / PEFT's mixed batch"] = (self.peft_step / self.lora_step, 25.0)
        return found

    def table(self) -> Table:
        job = self.job
        table = Table(title=f"{self.device}, {self.date}", caption=self.peft_note or None)
        table.add_column("figure")
        table.add_column("reached", justify="right")
        table.add_column("wanted", justify="right")
        for name, (reached, wanted) in self.ratios().items():
            colour = "green" if reached >= wanted else "red"
            table.add_row(name, f"[{colour}]{reached:.3f}[/]", f"{wanted:.2f}")
        table.add_section()
        tokens = job.rows * job.prompt
        rates = {
            "base rows, tokens/s": job.rows / self.base_step,
            "LoRA rows, tokens/s": job.rows / self.lora_step,
            "PEFT, tokens/s": job.rows / self.peft_step if self.peft_step else None,
            "floor of a step, ms": 1e3 * self.floor,
            "base step, ms": 1e3 * self.base_step,
            "LoRA step, ms": 1e3 * self.lora_step,
            **{f"{name} step, none begun ahead, ms": 1e3 * value for name, value in self.apart.items()},
            **{f"rows come and go, {name}, tokens/s": value for name, value in self.churn.items()},
            **{f"{name} step, its graph alone, ms": 1e3 * value for name, value in self.replay.items()},
            "steps replayed": self.replayed,
            "prefill, tokens/s": tokens / self.prefill,
            "prefill with LoRA, tokens/s": tokens / self.prefill_lora,
            "transformers' forward, tokens/s": tokens / self.transformers_prefill,
            "read bandwidth, GB/s": self.read_gb_per_s,
            "pinned copy, GB/s": self.pinned_gb_per_s,
            "swap of an adapter, ms": 1e3 * self.swap,
        }
        for name, value in rates.items():
            table.add_row(name, "-" if value is None else f"{value:,.2f}", "")
        for name, result in self.tests.items():
            table.add_row(f"tests: {name}", str(result), "")
        return table


def main(
    device: Annotated[str, typer.Option(help="cuda, or cpu to see whether the script runs.")] = "cuda",
    tiny: Annotated[bool, typer.Option(help="A model of two small layers.")] = False,
    tests: Annotated[bool, typer.Option(help="Run the kernels' tests first.")] = True,
    peft: Annotated[bool, typer.Option(help="Run PEFT's mixed batch last.")] = True,
    output: Annotated[Path, typer.Option(help="Where the JSON goes.")] = Path("gpu.json"),
) -> None:
    """Check, measure, print a table, write JSON."""
    place = torch.device(device)
    if place.type == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter("torch finds no CUDA device", param_hint="--device")
    quiet()
    console, job = Console(), TINY if tiny else Job()
    name = torch.cuda.get_device_name() if place.type == "cuda" else "CPU"
    figures = Figures(name, datetime.now(UTC).isoformat(timespec="seconds"), job)
    if tests:
        console.print("kernel tests ...")
        figures.tests = run_tests(place)
    with tempfile.TemporaryDirectory(prefix="polypeft-gpu-") as scratch:
        folder = Path(scratch)
        write_config(folder / "model", tiny=tiny)
        console.print("model ...")
        engine = make_engine(folder, place, rows=job.rows, tiny=tiny)
        adapters = [make_packed(engine, seed) for seed in range(job.rows)]
        refs = offer(engine, adapters)
        clock = Clock(place)
        bandwidths(figures, clock, adapters[0])
        console.print("decode ...")
        decode(figures, engine, clock, refs)
        console.print("prefill ...")
        prefill(figures, engine, refs)
        console.print("swap ...")
        swap(figures, engine, clock, adapters[0])
        engine.close()
        console.print("transformers, PEFT ...")
        compare(figures, folder / "model", clock, with_peft=peft)
    output.write_text(
        json.dumps(asdict(figures) | {"floor": figures.floor, "ratios": figures.ratios()}, indent=1) + "\n",
        encoding="utf-8",
    )
    console.print(figures.table())


def bandwidths(figures: Figures, clock: Clock, packed: Packed) -> None:
    """Of reading the device's memory, and of a pinned copy of as many bytes as an adapter has."""
    job = figures.job
    source = torch.ones(job.copy_bytes // 4, dtype=torch.float32, device=clock.device)
    target = torch.empty_like(source)
    figures.read_gb_per_s = max(
        source.nbytes / clock.best(lambda: source.sum()) / 1e9,
        2 * source.nbytes / clock.best(lambda: target.copy_(source)) / 1e9,
    )
    figures.adapter_bytes = packed.nbytes
    place = torch.empty_like(packed.flat, device=clock.device)
    seconds = clock.best(lambda: place.copy_(packed.flat, non_blocking=True))
    figures.pinned_gb_per_s = packed.nbytes / seconds / 1e9


def decode(figures: Figures, engine: Engine, clock: Clock, refs: list[AdapterRef]) -> None:
    """Steps in which all rows decode, of base rows and of rows with an adapter each, in turns."""
    job, model = figures.job, engine.model
    linears = [weight for name, weight in model.weights.items() if engine.base.sites[name].kind == "linear"]
    figures.weight_bytes = sum(weight.nbytes for weight in linears)
    per_token = 2 * engine.base.layers * engine.base.kv_heads * engine.base.head_dim * linears[0].itemsize
    figures.kv_bytes_read = job.rows * (job.prompt + job.steps // 2) * per_token
    uses: dict[str, list[AdapterRef | None]] = {"base": [None] * job.rows, "LoRA": [*refs]}
    arms = [(name, off) for off in (False, True) for name in uses]
    found: dict[tuple[str, bool], list[float]] = {arm: [] for arm in arms}
    for repeat in range(-1, job.repeats):  # the first round compiles, records, loads
        before = model.graphs.replays
        for name, off in arms:
            model.lookahead.off = off
            seconds = seconds_of_steps(engine, uses[name], job.prompt, job.steps)
            if repeat >= 0:
                found[name, off] += seconds
        figures.replayed = (model.graphs.replays - before) / (len(arms) * (job.steps + 1))
    rates: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(1 + job.repeats):
        for off, own in rates.items():
            model.lookahead.off = off
            own.append(rate_of_churn(engine, uses["LoRA"], job.prompt, job.steps))
    model.lookahead.off = False
    figures.churn = {
        "none begun ahead" if off else "begun ahead": median(own[1:]) for off, own in rates.items()
    }
    figures.base_step, figures.lora_step = (median(found[name, False]) for name in uses)
    figures.apart = {name: median(found[name, True]) for name in uses}
    for variant, (recorded, _) in model.graphs.recorded.items():
        if variant.rows >= job.rows:
            figures.replay["LoRA" if variant.traces else "base"] = clock.best(recorded.replay)


def prefill(figures: Figures, engine: Engine, refs: list[AdapterRef]) -> None:
    """All prompts in one step."""
    job = figures.job
    arms: dict[str, list[AdapterRef | None]] = {"base": [None] * job.rows, "lora": [*refs]}
    found: dict[str, list[float]] = {name: [] for name in arms}
    for repeat in range(-1, job.repeats):
        for name, uses in arms.items():
            seconds = seconds_of_steps(engine, uses, job.prompt, 0)
            if repeat >= 0:
                found[name] += seconds
    figures.prefill, figures.prefill_lora = (median(found[name]) for name in ("base", "lora"))


def swap(figures: Figures, engine: Engine, clock: Clock, packed: Packed) -> None:
    """An adapter into a slot, tables included, until the device has it all."""
    bank = engine.model.step.banks["lora"]
    slot = engine.cache.free[-1]

    def replace() -> None:
        bank.clear(slot)
        bank.put(slot, packed)

    figures.swap = clock.best(replace)
    bank.clear(slot)


def compare(figures: Figures, folder: Path, clock: Clock, *, with_peft: bool) -> None:
    """transformers' own forward of the same prompts; PEFT's mixed batch, if the device has room for it."""
    from benchmarks.gpu.parts import random_model

    job = figures.job
    model = random_model(folder, clock.device)
    ids = torch.randint(model.config.vocab_size, (job.rows, job.prompt), device=clock.device)

    @torch.inference_mode()
    def forward() -> object:
        return model(input_ids=ids, use_cache=True, logits_to_keep=1)

    figures.transformers_prefill = clock.best(forward)
    if not with_peft or find_spec("peft") is None:
        figures.peft_note = "PEFT did not run."
        return
    with suppress(torch.OutOfMemoryError):
        figures.peft_step = try_peft(model, ids, LINEARS, RANK, clock)
    if figures.peft_step is None:
        figures.peft_note = "PEFT's adapters did not fit beside the model."


def median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


if __name__ == "__main__":
    typer.run(main)
