"""New tokens per second of one batch whose rows use different adapters: ours, PEFT's, and none at all.

    python -m benchmarks.mixed_batch                       # everything; takes the better part of an hour
    python -m benchmarks.mixed_batch --rows 16 --repeats 3 --arm polypeft-lora --arm peft-mixed

Arms take turns within each repeat, so that a slow minute of the machine hits them all; medians are shown.
Rows have 64 prompt and 64 new tokens, greedy, fp32. Ours must give the oracle's tokens, row for row. In the
arms called lookup rows guess ahead (prompt lookup), which --repeat-prompts gives something to find; nothing
is guessed in the others. int8 is `--quantize int8`, bf16 is `--lora-dtype bfloat16`; their tokens are their
own. vLLM's arms run if named: they need an environment of their own (see `vllm_cpu`).
"""

import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress

from benchmarks.support.arms import Job, Remote, quiet
from benchmarks.support.inputs import RANK, make_adapters, make_prompts
from benchmarks.support.machine import Machine, floor_seconds, measure, work_of
from benchmarks.support.report import Cell, Report
from benchmarks.support.vllm_cpu import Vllm
from server.base_model.default_model import ensure_default_model

LINE = 12  # tokens
CACHE = Path(__file__).resolve().parents[1] / ".cache"


@dataclass(frozen=True)
class Arm:
    name: str
    system: str
    adapters: bool
    oracles: tuple[str, ...] = ()  # arms whose tokens it must give, the most trustworthy first
    always: bool = True  # run, unless others are named


ARMS = [
    Arm("polypeft-base", "polypeft", adapters=False, oracles=("transformers",)),
    Arm("polypeft-lora", "polypeft", adapters=True, oracles=("peft-switch", "peft-mixed")),
    Arm("polypeft-lora-bf16", "polypeft-bf16", adapters=True),
    Arm("lookup-base", "polypeft-lookup", adapters=False, oracles=("polypeft-base",)),
    Arm("lookup-lora", "polypeft-lookup", adapters=True, oracles=("polypeft-lora",)),
    Arm("int8-base", "polypeft-int8", adapters=False),
    Arm("int8-lora", "polypeft-int8", adapters=True),
    Arm("int8-lookup-lora", "polypeft-int8-lookup", adapters=True, oracles=("int8-lora",)),
    Arm("transformers", "transformers", adapters=False),
    Arm("peft-mixed", "peft-mixed", adapters=True, oracles=("peft-switch",)),
    Arm("peft-switch", "peft-switch", adapters=True),
    Arm("vllm-base", "vllm", adapters=False, oracles=("transformers", "polypeft-base"), always=False),
    Arm("vllm-lora", "vllm-lora", adapters=True, oracles=("peft-switch", "polypeft-lora"), always=False),
]


def main(
    arm: Annotated[list[str] | None, typer.Option(help="An arm to run; may be repeated.")] = None,
    rows: Annotated[list[int] | None, typer.Option(help="Rows in the batch; may be repeated.")] = None,
    repeats: int = 5,
    prompt_tokens: int = 64,
    new_tokens: int = 64,
    threads: int = 2,
    repeat_prompts: Annotated[bool, typer.Option(help="Prompts of one line, over and over.")] = False,
    switch_rows: Annotated[int, typer.Option(help="Rows at most for peft-switch, whose rate is flat.")] = 4,
    model: Annotated[
        Path | None, typer.Option(help="Folder of a Llama-like model; else the default.")
    ] = None,
    output: Annotated[Path, typer.Option(help="Where the JSON goes.")] = Path("mixed_batch.json"),
    plot: Annotated[Path | None, typer.Option(help="Where to draw tokens/s by rows, as PNG.")] = None,
) -> None:
    """Measure, compare, print a table, write JSON."""
    if unknown := set(arm or ()) - {a.name for a in ARMS}:
        raise typer.BadParameter(f"no such arm: {', '.join(sorted(unknown))}", param_hint="--arm")
    quiet()
    chosen = [a for a in ARMS if (a.name in arm if arm else a.always)]
    turns = [(a, n) for n in sorted(rows or [1, 4, 16, 32]) for a in chosen]
    turns = [(a, n) for a, n in turns if a.name != "peft-switch" or n <= switch_rows]
    most = max(n for _, n in turns)
    folder = model or ensure_default_model(CACHE)
    machine = measure(threads)
    with tempfile.TemporaryDirectory(prefix="polypeft-adapters-") as scratch:
        adapters, parameters = make_adapters(folder, Path(scratch), most)
        job = Job(folder, adapters, threads, new_tokens)
        prompts = make_prompts(folder, most, prompt_tokens)
        if repeat_prompts:
            prompts = [(prompt[:LINE] * prompt_tokens)[:prompt_tokens] for prompt in prompts]
        cells = compare(job, turns, prompts, repeats)
    report = Report(
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        machine=machine,
        job={"model": folder.name, "prompt_tokens": prompt_tokens, "new_tokens": new_tokens, "rank": RANK},
        floor_tokens_per_s=bounds(
            machine, folder, {n for _, n in turns}, prompt_tokens, new_tokens, parameters
        ),
        cells=cells,
    )
    report.write(output)
    Console().print(report.table())
    if plot:
        report.draw(plot)


def compare(job: Job, turns: list[tuple[Arm, int]], prompts: list[list[int]], repeats: int) -> list[Cell]:
    """Run every turn `repeats` times, all turns once before any comes again."""
    cells = [Cell(arm.name, n) for arm, n in turns]
    tokens: dict[tuple[str, int], list[list[int]]] = {}
    with ExitStack() as stack, Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("loading", total=(repeats + 1) * len(turns))
        systems = {name: start(name, job) for name in {arm.system for arm, _ in turns}}
        for system in systems.values():
            stack.callback(system.close)
        for repeat in range(-1, repeats):
            for (arm, n), cell in zip(turns, cells, strict=True):
                progress.update(task, description="warming up" if repeat < 0 else f"{arm.name}, {n} rows")
                result = systems[arm.system].generate(prompts[:n], adapters=arm.adapters)
                if repeat >= 0:  # the first round loads adapters, touches memory, builds kernels
                    cell.seconds.append(result.seconds)
                    cell.tokens_per_s.append(n * job.new_tokens / result.seconds)
                    tokens[arm.name, n] = result.tokens
                progress.advance(task)
    for (arm, n), cell in zip(turns, cells, strict=True):
        golden = golden_rows(arm, tokens)
        compared = [i for i in range(n) if i in golden]
        cell.compared_rows = len(compared)
        cell.equal_rows = sum(tokens[arm.name, n][i] == golden[i] for i in compared)
    return cells


def start(system: str, job: Job) -> Remote:
    """Returns when it has loaded."""
    if system.startswith("vllm"):
        return Vllm(job, lora=system == "vllm-lora")
    return Remote(system, job)


def golden_rows(arm: Arm, tokens: dict[tuple[str, int], list[list[int]]]) -> dict[int, list[int]]:
    """Row i has the same prompt and adapter at every batch size: {row: tokens of its best oracle}."""
    found: dict[int, list[int]] = {}
    for oracle in reversed(arm.oracles):
        for name, n in sorted(tokens, reverse=True):
            if name == oracle:  # the smaller the batch, the later it comes and the more it counts
                found |= dict(enumerate(tokens[name, n]))
    return found


def bounds(
    machine: Machine, model: Path, counts: set[int], prompt: int, new: int, adapter_parameters: int
) -> dict[str, dict[int, float]]:
    """The most tokens per second this machine could give, by rows, without adapters and with one a row."""
    work = work_of(model)

    def bound(n: int, extra: int) -> float:
        return (
            n * new / floor_seconds(machine, work, rows=n, prompt=prompt, new=new, adapter_parameters=extra)
        )

    return {
        "base": {n: bound(n, 0) for n in sorted(counts)},
        "lora": {n: bound(n, adapter_parameters) for n in sorted(counts)},
    }


if __name__ == "__main__":
    typer.run(main)
