"""Prompt tokens per second: our engine's prefill, and the forward pass of transformers' class.

    python -m benchmarks.prefill                           # half a minute

Both read the same prompts and give the logits of each one's last token, in turns, fp32, nothing cached;
medians. transformers takes the prompts of a shape as one batch. Ours goes the way of any request: admitted
by the scheduler, in steps of so many tokens, K and V into pages, a token sampled.
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

from benchmarks.support.arms import quiet
from benchmarks.support.inputs import make_prompts
from benchmarks.support.machine import measure, work_of
from server.base_model.default_model import ensure_default_model
from server.engine.engine import Engine
from server.messages import Generate, Sampling
from server.settings import Settings
from tests.fixtures.engine import run

CACHE = Path(__file__).resolve().parents[1] / ".cache"
SHAPES = ((1, 64), (1, 256), (1, 1024), (16, 64), (4, 256))  # prompts, tokens of each


def main(
    repeats: int = 5,
    threads: int = 2,
    output: Annotated[Path, typer.Option(help="Where the JSON goes.")] = Path("prefill.json"),
) -> None:
    """Measure, compare, print a table, write JSON."""
    from transformers import AutoModelForCausalLM

    quiet()
    torch.set_num_threads(threads)
    folder = ensure_default_model(CACHE)
    machine = measure(threads)
    work = work_of(folder)
    bound = machine.sgemm_gflop_per_s * 1e9 / (2 * (work.parameters - work.head_parameters))
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    table = Table("prompts", "ours", "transformers", "ours / transformers", title="prompt tokens/s")
    shapes = []
    with tempfile.TemporaryDirectory(prefix="polypeft-prefill-") as scratch:
        settings = Settings(data_dir=Path(scratch), threads=threads, prefix_cache=False, lookup_tokens=0)
        engine = Engine(settings, folder)
        for count, length in SHAPES:
            prompts = make_prompts(folder, count, length)
            seconds = in_turns(repeats, ours(engine, prompts), theirs(model, prompts))
            speeds = [count * length / statistics.median(own) for own in seconds]
            table.add_row(
                f"{count} of {length}", *(f"{v:.0f}" for v in speeds), f"{speeds[0] / speeds[1]:.2f}"
            )
            shapes.append({"prompts": count, "tokens": length, "ours": seconds[0], "theirs": seconds[1]})
        engine.close()
    table.caption = f"{machine.processor}, {machine.sgemm_gflop_per_s:.0f} GFLOP/s: {bound:.0f} at most"
    Console().print(table)
    date = datetime.now(UTC).isoformat(timespec="seconds")
    report = {"date": date, "machine": asdict(machine), "model": folder.name, "seconds": shapes}
    output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def in_turns(repeats: int, *arms: Callable[[], None]) -> list[list[float]]:
    """Seconds of each arm; a first round is not counted."""
    seconds: list[list[float]] = [[] for _ in arms]
    for repeat in range(-1, repeats):
        for arm, own in zip(arms, seconds, strict=True):
            start = time.perf_counter()
            arm()
            if repeat >= 0:
                own.append(time.perf_counter() - start)
    return seconds


def ours(engine: Engine, prompts: list[list[int]]) -> Callable[[], None]:
    sampling = Sampling(max_tokens=1, temperature=0.0, ignore_eos=True)

    def prefill() -> None:
        done = run(engine, [Generate(str(i), "tenant", ids, sampling) for i, ids in enumerate(prompts)])
        if any(row.error for row in done):
            raise RuntimeError(str([row.error for row in done]))

    return prefill


def theirs(model: Any, prompts: list[list[int]]) -> Callable[[], None]:
    ids = torch.tensor(prompts)

    @torch.inference_mode()
    def prefill() -> None:
        model(input_ids=ids, logits_to_keep=1)

    return prefill


if __name__ == "__main__":
    typer.run(main)
