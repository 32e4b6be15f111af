"""What a step costs by how many distinct adapters its rows use, and what adapters cost where no row has one.

    python -m benchmarks.distinct                        # three minutes

16 rows decode. `n` of them distinct: LoRA r16 on all linears, shared by 16 / n rows each. Beyond the bytes
that further adapters add, read once a step, a step should take what it takes with one. `base` is rows without
an adapter while all others lie in their slots. Arms take turns; medians of all their steps.

Idle: every other step of rows without adapters runs `bare`, with the banks taken from the model and the cache
never looked after.
"""

import json
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from datetime import UTC, datetime
from itertools import cycle
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from adapters_store.object_store.store import Objects
from benchmarks.step_budget import PROMPT, Spent, drive
from benchmarks.support.arms import quiet
from benchmarks.support.inputs import make_adapters, make_prompts
from benchmarks.support.machine import measure
from server.base_model.default_model import ensure_default_model
from server.engine.engine import Engine
from server.messages import AdapterRef, Generate, Sampling
from server.settings import Settings
from tests.fixtures.engine import publish

CACHE = Path(__file__).resolve().parents[1] / ".cache"
BARE, BASE = "bare", "base"
LONG = 64  # new tokens


def main(
    rows: int = 16,
    repeats: int = 5,
    threads: int = 2,
    output: Annotated[Path, typer.Option(help="Where the JSON goes.")] = Path("distinct.json"),
) -> None:
    """Measure, print a table, write JSON."""
    quiet()
    folder = ensure_default_model(CACHE)
    machine = measure(threads)
    counts = [1 << i for i in range(rows.bit_length()) if rows % (1 << i) == 0]
    with tempfile.TemporaryDirectory(prefix="polypeft-distinct-") as scratch:
        settings = Settings(
            data_dir=Path(scratch) / "data", threads=threads, prefix_cache=False, lookup_tokens=0
        )
        engine = Engine(settings, folder)
        objects = Objects.open(settings.store_url)
        folders, parameters = make_adapters(folder, Path(scratch), rows)
        refs = [publish(objects, engine.base, own) for own in folders]
        prompts = make_prompts(folder, rows, PROMPT)
        arms: dict[str, list[AdapterRef | None]] = {BASE: [None] * rows}
        arms |= {str(n): [refs[i % n] for i in range(rows)] for n in counts}
        spent = {name: Spent() for name in arms}
        apart = {BARE: Spent(), BASE: Spent()}
        for repeat in range(-1, repeats):  # the first loads and records
            for name, uses in arms.items():
                drive(engine, prompts, uses, spent[name] if repeat >= 0 else Spent(), {})
            if repeat >= 0:
                idle(engine, prompts, apart)
        engine.close()
    steps = {name: 1e3 * own.step for name, own in spent.items()}
    read = 1e3 * 4 * parameters / (machine.read_gb_per_s * 1e9)  # ms for one adapter's bytes
    expected = {str(n): steps["1"] + (n - 1) * read for n in counts}
    report = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": asdict(machine),
        "rows": rows,
        "step_ms": steps,
        "expected_ms": expected,
        "idle": apart[BASE].step / apart[BARE].step,
    }
    output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    table = Table(
        "rows' adapters", "ms a step", "one, and the others' bytes", "ratio", title=machine.processor
    )
    for name, value in steps.items():
        told = expected.get(name)
        known = (f"{told:.1f}", f"{value / told:.3f}") if told else ("", "")
        table.add_row(name, f"{value:.1f}", *known)
    Console().print(table)
    Console().print(f"{BASE} / {BARE}: {report['idle']:.4f}; {machine.read_gb_per_s:.0f} GB/s")


def idle(engine: Engine, prompts: list[list[int]], spent: dict[str, Spent]) -> None:
    """Rows without adapters, each of their steps in turn with and without what there is for adapters."""
    sampling = Sampling(max_tokens=LONG, temperature=0.0, ignore_eos=True)
    for i, prompt in enumerate(prompts):
        engine.submit(Generate(str(i), "tenant", prompt, sampling))
    for name in cycle(spent):
        if not engine.busy:
            return
        with without_adapters(engine) if name == BARE else nullcontext():
            start = time.perf_counter()
            engine.step()
            seconds = time.perf_counter() - start
        if engine.model.step.in_place == len(prompts):
            spent[name].steps.append(seconds)


@contextmanager
def without_adapters(engine: Engine) -> Iterator[None]:
    """Nothing of a step has to do with adapters meanwhile."""
    model, cache = engine.model, vars(engine.cache)
    banks = model.step.banks
    model.install({})
    cache |= {"poll": lambda: None, "prioritise": lambda _places: None}
    try:
        yield
    finally:
        model.install(banks)
        del cache["poll"], cache["prioritise"]


if __name__ == "__main__":
    typer.run(main)
