"""What figures cost: of the engine's steps, and of one core of the API. No model; everything counted is real.

python -m benchmarks.api_process.metrics_cost
"""

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from server.engine.metrics.counters import EngineMetrics
from server.engine.metrics.step_timer import SAMPLE_EVERY, StepTimer, TimedBank
from server.engine.scheduling.row import Row
from server.messages import AdapterRef, Generate, Sampling, Stats, decode_event, encode
from server.metrics import Metrics
from server.settings import MULTIPROCESS, inherited_environment, multiprocess_dir

STEP_SECONDS = 0.050  # 16 rows of SmolLM2-135M decode in about that, on two cores
ROWS = 16
TOKENS = 64  # of an answer: a row ends every so many of its steps
SITES = 210  # calls of banks in a step of that model
TOP = 20
SCRAPE_SECONDS = 15.0


def seconds(work: Callable[[], object], count: int) -> float:
    """The least of five times, each of `count` calls, for one call."""
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(count):
            work()
        best = min(best, (time.perf_counter() - start) / count)
    return best


def row(number: int) -> Row:
    adapter = AdapterRef(f"ten_{number}", f"a{number}", 1, f"{number:064x}", "lora", "")
    command = Generate(str(number), f"ten_{number}", [1] * 64, Sampling(max_tokens=TOKENS), adapter)
    made = Row(command, 0, tokens=[1] * 128, prompt_length=64)
    made.timing.started = made.timing.first_token = 1.0
    made.timing.waited = {"capacity": 0.5, "adapter": 0.1}
    return made


class Nothing:
    """A bank that computes nothing."""

    def affine(self, *_: object) -> None: ...


def of_engine(console: Console) -> None:
    with tempfile.TemporaryDirectory() as folder:
        figures = EngineMetrics(Path(folder) / "engine", "ids", TOP)
        clock = StepTimer(figures, torch.device("cpu"))
        rows = [row(number) for number in range(200)]

        def step() -> None:
            clock.begin(time.perf_counter())
            for phase in ("forward", "sample", "deliver"):
                clock.lap(phase)
            figures.observe("batch_rows", ROWS)
            figures.observe("batch_tokens", ROWS)

        def end() -> None:
            figures.record_end(rows[int(time.perf_counter() * 1e6) % 200], 2.0)

        def report() -> None:
            figures.review(time.monotonic())
            encode(figures.report("boot", {}, []))

        bank = Nothing()
        timed = TimedBank(bank, clock.time_call)  # type: ignore[arg-type]
        parts = {
            "phases and batch": seconds(step, 2000),
            "rows that end": seconds(end, 2000) * ROWS / TOKENS,
            "banks timed, 1 step of 16": (
                seconds(lambda: timed.affine(1, 2, 3), 20_000) - seconds(lambda: bank.affine(1, 2, 3), 20_000)
            )
            * SITES
            / SAMPLE_EVERY,
            "report, once a second": seconds(report, 50) * STEP_SECONDS,
        }
        for name, cost in parts.items():
            console.print(f"  {name:28} {cost * 1e6:8.1f} us a step")
        total = sum(parts.values())
        console.print(f"engine: {total * 1e6:.0f} us of a step of 50 ms: {100 * total / STEP_SECONDS:.2f}%")


def of_api(console: Console) -> None:
    metrics = Metrics("model", multiprocess_dir())
    figures = EngineMetrics(None, "ids", TOP)
    for number in range(200):
        figures.record_end(row(number), 2.0)
    message = encode(figures.report("boot", {}, []))

    def token() -> None:
        metrics.observe("between_tokens", 0.05)

    def request() -> None:
        metrics.opened(1)
        metrics.observe("first_token", 0.2)
        metrics.observe("end_to_end", 2.0)
        metrics.count("finished", "length")
        metrics.count("http_requests", "/v1/chat/completions", "200", "standard")
        metrics.observe("http_seconds", 2.0, "/v1/chat/completions")
        for _ in range(3):
            metrics.on_valkey_call(0.001, False)
        metrics.opened(-1)

    def absorb() -> None:
        found = decode_event(message)
        assert isinstance(found, Stats)
        metrics.absorb(found)

    rate = ROWS / STEP_SECONDS  # tokens a second
    parts = {
        "tokens": seconds(token, 5000) * rate,
        "requests": seconds(request, 2000) * rate / TOKENS,
        "the engine's report": seconds(absorb, 50),
        "a scrape every 15 s": seconds(metrics.render, 10) / SCRAPE_SECONDS,
    }
    for name, cost in parts.items():
        console.print(f"  {name:28} {cost * 1e6:8.1f} us a second")
    total = sum(parts.values())
    console.print(f"api: {total * 1e3:.2f} ms of a core's second at {rate:.0f} tokens/s: {100 * total:.2f}%")


def main(part: Annotated[str, typer.Argument(hidden=True)] = "engine") -> None:
    console = Console()
    if part == "api":
        of_api(console)
        return
    of_engine(console)
    with tempfile.TemporaryDirectory() as folder:  # several API processes: the dearer way to count
        environment = inherited_environment() | {MULTIPROCESS: folder}
        subprocess.run(
            [sys.executable, "-m", "benchmarks.api_process.metrics_cost", "api"], env=environment, check=True
        )


if __name__ == "__main__":
    typer.run(main)
