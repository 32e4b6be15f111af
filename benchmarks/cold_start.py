"""Time to first token with the adapter on the device, in RAM, on disk, in the store; what loads cost others.

    python -m benchmarks.cold_start                          # about five minutes on two cores

One engine, SmolLM2-135M, LoRA r16 on all seven linears (19.5 MB), greedy, fp32, a store in a folder. Tiers
take turns within each repeat; medians are shown. A cold tier's floor is the warm time plus the adapter's
bytes over the bandwidth at which they can be read, measured in the same run. A gap is what a step takes
of rows that decode, while adapters come from the store one after the other and while none does; they
guess nothing, for a guess makes a step longer. What all the gaps together are longer for is what loads took.
"""

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from adapters_store.manifest import Manifest, decode_manifest
from adapters_store.object_store.store import Objects
from benchmarks.support.arms import quiet
from benchmarks.support.inputs import make_adapters, make_prompts
from benchmarks.support.machine import measure
from server.base_model.default_model import ensure_default_model
from server.engine.engine import Engine
from server.memory import paused_garbage_collector
from server.messages import AdapterRef, Forget, Generate, Prefetch, Sampling
from server.settings import Settings
from tests.fixtures.engine import publish

CACHE = Path(__file__).resolve().parents[1] / ".cache"
TIERS = ("device", "ram", "disk", "store")
ROUNDS = 4  # of steps alone and steps beside loads
GOALS = {"ram": 1.05, "disk": 1.15, "store": 1.15}  # of the floor; RAM's is the warm time itself


class Bench:
    """An engine, some adapters, and ways to have them in one tier and no higher."""

    def __init__(self, engine: Engine, refs: list[AdapterRef]) -> None:
        self.engine = engine
        self.refs = refs
        self.count = 0

    def place(self, ref: AdapterRef, tier: str) -> None:
        """Bring it there from wherever it is; nothing is under way when this returns."""
        engine, loader = self.engine, self.engine.loader
        self.first_token(ref, [1, 2, 3])
        manifest = self.manifest(ref)
        until(
            lambda: (
                loader.ram.nbytes == sum(e.item.nbytes for e in loader.ram.index.entries.values() if e.item)
            )
        )
        if tier == "device":
            return
        resident = engine.cache.by_digest[ref.digest]
        engine.cache._evict(resident)  # noqa: SLF001 - as if its slot had been needed
        if tier in ("disk", "store"):
            loader.ram.drop(ref.digest)
        if tier == "disk":  # a policy that finds it not worth a copy is not what is measured here
            self._copy_to_disk(ref)
        if tier == "store":
            loader.disk.drop(manifest.weights.sha256)

    def _copy_to_disk(self, ref: AdapterRef) -> None:
        blob = self.manifest(ref).weights
        data = memoryview(bytearray(blob.bytes))
        self.engine.loader.objects.read_sync(blob.key, data, blob.sha256)
        if not self.engine.loader.disk.write(blob.sha256, ref.tenant, data):
            raise RuntimeError("the disk tier took no copy")

    def manifest(self, ref: AdapterRef) -> Manifest:
        return decode_manifest(self.engine.loader.objects.get_sync(ref.manifest_key))

    def submit(self, ref: AdapterRef | None, prompt: list[int], tokens: int) -> str:
        self.count += 1
        sampling = Sampling(max_tokens=tokens, temperature=0.0, ignore_eos=True)
        tenant = ref.tenant if ref else "tenant"
        self.engine.submit(Generate(str(self.count), tenant, prompt, sampling, ref))
        return str(self.count)

    def first_token(self, ref: AdapterRef, prompt: list[int]) -> float:
        """Seconds until it is there; steps as the engine's process does."""
        start = time.perf_counter()
        row = self.submit(ref, prompt, 1)
        while True:
            for chunk in self.engine.step():
                if chunk.error:
                    raise RuntimeError(str(chunk.error))
                if chunk.id == row:
                    return time.perf_counter() - start
            if not self.engine.scheduler.running:
                time.sleep(0.001)

    def gaps(self, rows: int, tokens: int, hint: Callable[[int], None]) -> list[float]:
        """What steps of `rows` base rows that decode take; `hint` is called before each step."""
        for i in range(rows):
            self.submit(None, [i + 1] * 16, tokens)
        times, step = [], 0
        while self.engine.busy:
            hint(step)
            start = time.perf_counter()
            self.engine.step()
            times.append(time.perf_counter() - start)
            step += 1
        return times[2:]  # the first ones are prompts


def read_seconds(path: Path) -> float:
    """The least time in which all of a file comes into memory."""
    buffer, best = bytearray(path.stat().st_size), float("inf")
    for _ in range(5):
        start = time.perf_counter()
        with path.open("rb", buffering=0) as file:
            file.readinto(buffer)
        best = min(best, time.perf_counter() - start)
    return best


def measure_tiers(
    bench: Bench, prompts: dict[int, list[list[int]]], repeats: int
) -> dict[int, dict[str, list[float]]]:
    """{prompt tokens: {tier: seconds of each repeat}}"""
    found: dict[int, dict[str, list[float]]] = {n: {tier: [] for tier in TIERS} for n in prompts}
    for repeat in track(range(-1, repeats), console=Console(stderr=True)):
        for length, texts in prompts.items():
            order = TIERS[repeat % 4 :] + TIERS[: repeat % 4]
            for tier in order:
                ref = bench.refs[repeat % len(bench.refs)]
                bench.place(ref, tier)
                seconds = bench.first_token(ref, texts[repeat % len(texts)])
                if repeat >= 0:
                    found[length][tier].append(seconds)
    return found


def measure_gaps(bench: Bench, rows: int, tokens: int) -> dict[str, Any]:
    """Steps of rows that decode, alone and while one adapter after the other comes from the store."""
    loads = 0

    def load(step: int) -> None:
        nonlocal loads
        if step % 8 == 4:
            ref = bench.refs[loads % len(bench.refs)]
            bench.engine.submit(Forget(ref.digest))
            bench.engine.loader.disk.drop(blobs[ref.digest])
            bench.engine.submit(Prefetch(ref))
            loads += 1

    blobs = {ref.digest: bench.manifest(ref).weights.sha256 for ref in bench.refs}
    alone, loading = [], []
    for _ in range(ROUNDS):
        alone += bench.gaps(rows, tokens, lambda _step: None)
        loading += bench.gaps(rows, tokens, load)
    taken = [value for name, _, value in bench.engine.take_observations() if name == "adapter_load_seconds"]
    step = statistics.mean(alone)
    lost = (sum(loading) - len(loading) * step) / loads
    return {
        "rows": rows,
        "loads": loads,
        "load_ms": 1e3 * statistics.median(taken),
        "step_ms": 1e3 * statistics.median(alone),
        "step_ms_while_loading": 1e3 * statistics.median(loading),
        "p99_ms": 1e3 * statistics.quantiles(alone, n=100)[-1],
        "p99_ms_while_loading": 1e3 * statistics.quantiles(loading, n=100)[-1],
        "longest_ms": 1e3 * max(alone),
        "longest_ms_while_loading": 1e3 * max(loading),
        "lost_ms_a_load": 1e3 * lost,
        "steps_lost_a_load": lost / step,
    }


def main(
    repeats: int = 8,
    adapters: int = 3,
    prompt_tokens: Annotated[list[int] | None, typer.Option(help="May be repeated.")] = None,
    rows: Annotated[int, typer.Option(help="That decode while adapters are loaded.")] = 4,
    threads: int = 2,
    output: Annotated[Path, typer.Option(help="Where the JSON goes.")] = Path("cold_start.json"),
) -> None:
    """Measure, compare, print tables, write JSON."""
    quiet()
    folder = ensure_default_model(CACHE)
    machine = measure(threads)
    lengths = prompt_tokens or [256, 512]
    with tempfile.TemporaryDirectory(prefix="polypeft-cold-", ignore_cleanup_errors=True) as scratch:
        settings = Settings(
            data_dir=Path(scratch) / "data", threads=threads, prefix_cache=False, lookup_tokens=0
        )
        with paused_garbage_collector():  # as the engine's process does
            engine = Engine(settings, folder)
        objects = Objects.open(settings.store_url)
        folders, _parameters = make_adapters(folder, Path(scratch), adapters)
        bench = Bench(engine, [publish(objects, engine.base, path) for path in folders])
        texts = {n: make_prompts(folder, repeats, n) for n in lengths}
        seconds = measure_tiers(bench, texts, repeats)
        gaps = measure_gaps(bench, rows, 96)
        blob = bench.manifest(bench.refs[0]).weights
        reading = read_seconds(settings.data_dir / "store" / blob.key)
        engine.close()
    medians = {
        n: {tier: statistics.median(times) for tier, times in own.items()} for n, own in seconds.items()
    }
    ratios = {
        n: {tier: own[tier] / (own["device"] + (reading if tier != "ram" else 0)) for tier in GOALS}
        for n, own in medians.items()
    }
    show(medians, ratios, gaps, blob.bytes, reading)
    report = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": asdict(machine),
        "job": {
            "adapter_bytes": blob.bytes,
            "repeats": repeats,
            "model": folder.name,
            "cores": os.cpu_count(),
        },
        "read_gb_per_s": blob.bytes / reading / 1e9,
        "seconds": seconds,
        "of_floor": ratios,
        "goals": GOALS,
        "gaps": gaps,
    }
    output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def show(
    medians: dict[int, dict[str, float]],
    ratios: dict[int, dict[str, float]],
    gaps: dict[str, Any],
    nbytes: int,
    reading: float,
) -> None:
    title = f"First token, ms; adapter of {nbytes / 1e6:.1f} MB, read at {nbytes / reading / 1e9:.1f} GB/s"
    table = Table(
        "prompt", *TIERS, *(f"{tier} / floor (goal {goal:g})" for tier, goal in GOALS.items()), title=title
    )
    for n, own in medians.items():
        times = (f"{1e3 * own[tier]:.0f}" for tier in TIERS)
        table.add_row(str(n), *times, *(f"{ratios[n][tier]:.3f}" for tier in GOALS))
    Console().print(table)
    pauses = Table(
        "",
        "step, ms",
        "p99, ms",
        "longest, ms",
        title=f"{gaps['rows']} rows that decode, a load every 8 steps",
    )
    for title, suffix in (("alone", ""), (f"during {gaps['loads']} loads", "_while_loading")):
        pauses.add_row(title, *(f"{gaps[name + suffix]:.0f}" for name in ("step_ms", "p99_ms", "longest_ms")))
    Console().print(
        pauses,
        f"A load takes {gaps['load_ms']:.0f} ms beside them, and from them {gaps['lost_ms_a_load']:.0f} ms: "
        f"{gaps['steps_lost_a_load']:.2f} steps.",
    )


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError
        time.sleep(0.002)


if __name__ == "__main__":
    typer.run(main)
