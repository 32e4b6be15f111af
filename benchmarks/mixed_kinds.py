"""New tokens per second of one batch of our engine, by the kinds of adapter in it.

    python -m benchmarks.mixed_kinds --rows 16 --repeats 7

Every row has an adapter of its own. `five kinds` takes LoRA, bottleneck, prefix, prompt and BitFit in turn.
64 prompt and 64 new tokens, greedy, fp32; arms take turns within each repeat, medians are shown.

A prefix and a prompt put virtual tokens before each row. `base, longer` is the base with prompts as much
longer: what so many tokens cost whoever brings them.
"""

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file

from adapters_store.object_store.store import Objects
from benchmarks.support.arms import quiet
from benchmarks.support.inputs import LINEARS, SCALE, make_adapters, make_prompts
from benchmarks.support.machine import measure
from server.base_model.default_model import ensure_default_model
from server.engine.engine import Engine
from server.messages import AdapterRef, Generate, Sampling
from server.settings import Settings
from tests.fixtures.adapters import make_bitfit, make_prefix, make_prompt
from tests.fixtures.engine import publish, run
from tests.fixtures.models import load_model

CACHE = Path(__file__).resolve().parents[1] / ".cache"
VIRTUAL = 20  # tokens of a prefix or prompt
REDUCTION = 16  # of a bottleneck: AdapterHub's default for seq_bn
KINDS = ("lora", "bottleneck", "prefix", "prompt", "bitfit")
LONGER = "base, longer"
Arm = list[AdapterRef | None]


def main(
    rows: int = 16,
    repeats: int = 7,
    prompt_tokens: int = 64,
    new_tokens: int = 64,
    threads: int = 2,
    output: Annotated[Path, typer.Option(help="Where the JSON goes.")] = Path("mixed_kinds.json"),
) -> None:
    """Measure, compare, print a table, write JSON."""
    quiet()
    folder = ensure_default_model(CACHE)
    machine = measure(threads)
    with tempfile.TemporaryDirectory(prefix="polypeft-kinds-") as scratch:
        settings = Settings(
            data_dir=Path(scratch) / "data", threads=threads, prefix_cache=False, lookup_tokens=0
        )
        engine = Engine(settings, folder)
        adapters = publish_kinds(engine, folder, Path(scratch), rows)
        arms: dict[str, Arm] = {"base": [None] * rows, LONGER: [None] * rows}
        for kind in KINDS:
            arms[kind] = [*adapters[kind]]
        arms["five kinds"] = [adapters[KINDS[i % len(KINDS)]][i] for i in range(rows)]
        prompts = {name: make_prompts(folder, rows, prompt_tokens) for name in arms}
        prompts[LONGER] = make_prompts(folder, rows, prompt_tokens + VIRTUAL)
        seconds = measure_arms(engine, arms, prompts, new_tokens, repeats)
        engine.close()
    speed = {name: rows * new_tokens / statistics.median(times) for name, times in seconds.items()}
    table = Table("kind", "tokens/s", "of base", "of LoRA alone", title=f"{rows} rows, {rows} adapters")
    for name, rate in speed.items():
        table.add_row(name, f"{rate:.1f}", f"{rate / speed['base']:.3f}", f"{rate / speed['lora']:.3f}")
    Console().print(table)
    job = {"rows": rows, "prompt_tokens": prompt_tokens, "new_tokens": new_tokens, "model": folder.name}
    date = datetime.now(UTC).isoformat(timespec="seconds")
    report = {"date": date, "machine": asdict(machine), "job": job, "tokens_per_s": speed, "seconds": seconds}
    output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def measure_arms(
    engine: Engine, arms: dict[str, Arm], prompts: dict[str, list[list[int]]], new_tokens: int, repeats: int
) -> dict[str, list[float]]:
    """Seconds of each arm in each repeat; a first round, which loads the adapters, is not counted."""
    sampling = Sampling(max_tokens=new_tokens, temperature=0.0, ignore_eos=True)
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for repeat in range(-1, repeats):
        for name, refs in arms.items():
            commands = [
                Generate(str(i), "tenant", prompt, sampling, ref)
                for i, (prompt, ref) in enumerate(zip(prompts[name], refs, strict=True))
            ]
            start = time.perf_counter()
            done = run(engine, commands)
            elapsed = time.perf_counter() - start
            if any(row.error or len(row.tokens) != new_tokens for row in done):
                raise RuntimeError(f"{name}: {[row.error for row in done]}")
            if repeat >= 0:
                seconds[name].append(elapsed)
    return seconds


def publish_kinds(engine: Engine, model: Path, scratch: Path, count: int) -> dict[str, list[AdapterRef]]:
    """`count` random adapters of each kind, mild enough to leave a language model."""
    objects = Objects.open(engine.settings.store_url)
    base = load_model(model)
    make: dict[str, Callable[[Path, int], Path]] = {
        "bottleneck": lambda folder, seed: make_bottleneck(base.config, folder, seed),
        "prefix": lambda folder, seed: make_prefix(base, folder, VIRTUAL, seed=seed, scale=0.1),
        "prompt": lambda folder, seed: make_prompt(base, folder, VIRTUAL, seed=seed, scale=0.1),
        "bitfit": lambda folder, seed: make_bitfit(
            base, folder, LINEARS, seed=seed, scale=SCALE / 10, mode="delta"
        ),
    }
    loras, _parameters = make_adapters(model, scratch, count)
    folders = {"lora": loras} | {
        kind: [one(scratch / f"{kind}-{i}", i) for i in range(count)] for kind, one in make.items()
    }
    return {kind: [publish(objects, engine.base, folder) for folder in own] for kind, own in folders.items()}


def make_bottleneck(config: Any, folder: Path, seed: int) -> Path:
    """AdapterHub's seq_bn on every MLP, as its save_adapter writes it."""
    generator = torch.Generator().manual_seed(seed)
    hidden, width = config.hidden_size, config.hidden_size // REDUCTION
    tensors = {}
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}.output_adapters.adapters.one"
        shapes = {"adapter_down.0": (width, hidden), "adapter_up": (hidden, width)}
        for name, shape in shapes.items():
            tensors[f"{prefix}.{name}.weight"] = 0.02 * torch.randn(shape, generator=generator)
            tensors[f"{prefix}.{name}.bias"] = torch.zeros(shape[0])
    own = {
        "mh_adapter": False,
        "output_adapter": True,
        "non_linearity": "relu",
        "original_ln_before": True,
        "reduction_factor": REDUCTION,
    }
    kept = {"config": own, "hidden_size": hidden, "model_type": config.model_type, "name": "one"}
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(kept | {"version": "adapters.1.3.0"}))
    save_file(tensors, folder / "adapter.safetensors")
    return folder


if __name__ == "__main__":
    typer.run(main)
