"""Serving beside a training, over HTTP: time per output token with and without a job, and the job's speed.

    python -m benchmarks.co_serving                      # about six minutes
    python -m benchmarks.co_serving --rounds 5 --seconds 30

A real `polypeft serve` with its defaults, one LoRA job that trains all the time, and two loads: `light` is a
stream of 32 tokens that begins every few seconds, `full` is eight streams at once, each followed by the next.
In each round every load is measured with the training process running and with it stopped by SIGSTOP, in
turns, so that a slow minute of the machine hits all; and the job beside an idle server.

Time per output token is the time between two events of a stream; the first token is not in it.
"""

import asyncio
import contextlib
import json
import random
import signal
import statistics
import tempfile
import time
from collections.abc import AsyncIterator
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import httpx
import psutil
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks.support.arms import quiet
from benchmarks.support.inputs import make_prompts
from benchmarks.support.machine import measure
from benchmarks.tasks import lines_of
from server.base_model.default_model import ensure_default_model
from tests.e2e.serving import Serving, body
from tests.waiting import until

CACHE = Path(__file__).resolve().parents[1] / ".cache"
MODEL = "smollm2-135m-instruct"
PROMPT_TOKENS, NEW_TOKENS, PROMPTS = 48, 32, 200
POLL_SECONDS = 0.25
SETTLE_SECONDS = 2.0  # before a phase counts
START_SECONDS = 180.0
FEW_STEPS = 4
PROCESSES = ("engine", "api")


@dataclass(frozen=True)
class Load:
    streams: int
    pause: float  # seconds between the end of one and the next, on average


LOADS = {"idle": Load(0, 0.0), "light": Load(1, 4.0), "full": Load(8, 0.0)}


@dataclass
class Phase:
    """One load, with or without a job; all rounds together."""

    load: str
    job: bool
    gaps: list[float] = field(default_factory=list)  # seconds between two tokens of a stream
    first: list[float] = field(default_factory=list)  # seconds to a stream's first token
    trained: list[float] = field(default_factory=list)  # tokens per second, of each round
    server_cpu: list[float] = field(default_factory=list)  # cores that engine and API took, of each round

    def figures(self) -> dict[str, Any]:
        found: dict[str, Any] = {"load": self.load, "job": self.job, "tokens": len(self.gaps)}
        if len(self.gaps) > 1:
            cuts = statistics.quantiles(self.gaps, n=100)
            found |= {"tpot_p50_ms": 1000 * cuts[49], "tpot_p99_ms": 1000 * cuts[98]}
            found |= {"ttft_p50_ms": 1000 * statistics.median(self.first)}
        if self.job:
            found |= {"trained_tokens_per_s": statistics.median(self.trained), "each_round": self.trained}
        return found | {"server_cores": statistics.median(self.server_cpu)}


def main(
    rounds: int = 3,
    seconds: float = 20.0,
    output: Annotated[Path, typer.Option(help="Where the JSON goes.")] = Path("co_serving.json"),
) -> None:
    """Measure, print a table, write JSON."""
    quiet()
    model = ensure_default_model(CACHE)
    machine = measure(2)
    phases = [Phase(load, job) for load in LOADS for job in (False, True) if job or LOADS[load].streams]
    prompts = make_prompts(model, PROMPTS, PROMPT_TOKENS)
    with (
        tempfile.TemporaryDirectory(prefix="polypeft-co-") as scratch,
        Serving(MODEL, _cached(Path(scratch))) as server,
        Progress(transient=True) as progress,
    ):
        bench = Bench(server, prompts, seconds)
        bar = progress.add_task("serving and training", total=rounds * len(phases))
        for number in range(rounds):
            for phase in phases[:: 1 if number % 2 else -1]:
                asyncio.run(bench.measure(phase))
                progress.advance(bar)
        bench.end()
    figures = [phase.figures() for phase in phases]
    Console().print(table(figures))
    report = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": asdict(machine),
        "rounds": rounds,
        "seconds": seconds,
        "loads": {name: asdict(load) for name, load in LOADS.items()},
        "phases": figures,
    }
    output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def _cached(folder: Path) -> Path:
    """A place for a server that finds the default model where it would have put it."""
    (folder / "data").mkdir()
    (folder / "data" / "models").symlink_to(CACHE / "models")
    return folder


class Bench:
    """A server with a job that trains until `end`."""

    def __init__(self, server: Serving, prompts: list[list[int]], seconds: float) -> None:
        self.server = server
        self.prompts = prompts
        self.seconds = seconds
        self.rng = random.Random(1)
        self.key = server.tenant("co-serving")
        with server.http(self.key) as http:
            data = "".join(json.dumps(line) + "\n" for line in lines_of("titles")[0]).encode()
            sent = http.post("/v1/files", files={"file": ("t.jsonl", data)}, data={"purpose": "fine-tune"})
            asked = {
                "model": MODEL,
                "training_file": sent.json()["id"],
                "hyperparameters": {"n_epochs": 50, "batch_size": 1},
                "peft": {"type": "lora", "eval_share": 0.0},
            }
            made = http.post("/v1/fine_tuning/jobs", json=asked)
            self.job = str(made.raise_for_status().json()["id"])
            until(lambda: self._progress(http)["step"] > 0, server.log, START_SECONDS)
        worker = psutil.Process(server.pid("worker"))
        (self.training,) = worker.children()
        self.others = [psutil.Process(server.pid(name)) for name in PROCESSES]

    def end(self) -> None:
        self.training.send_signal(signal.SIGCONT)
        with self.server.http(self.key) as http:
            http.post(f"/v1/fine_tuning/jobs/{self.job}/cancel").raise_for_status()

    async def measure(self, phase: Phase) -> None:
        self.training.send_signal(signal.SIGCONT if phase.job else signal.SIGSTOP)
        headers = {"authorization": f"Bearer {self.key}"}
        async with httpx.AsyncClient(base_url=self.server.url, headers=headers, timeout=60) as http:
            load = LOADS[phase.load]
            tasks = [asyncio.create_task(self._stream(http, load, phase)) for _ in range(load.streams)]
            await asyncio.sleep(SETTLE_SECONDS)
            phase.gaps, kept = [], phase.gaps
            before, began = self._cpu(), time.perf_counter()
            async with self._training_speed(http, phase):
                await asyncio.sleep(self.seconds)
            phase.server_cpu.append((self._cpu() - before) / (time.perf_counter() - began))
            phase.gaps += kept
            for task in tasks:
                task.cancel()
            for error in await asyncio.gather(*tasks, return_exceptions=True):
                if isinstance(error, Exception):  # being cancelled is none
                    raise error

    async def _stream(self, http: httpx.AsyncClient, load: Load, phase: Phase) -> None:
        """One stream after the other, for ever."""
        while True:
            asked = body(MODEL, self.rng.choice(self.prompts), NEW_TOKENS, stream=True)
            last = time.perf_counter()
            gaps: list[float] = []
            async with http.stream("POST", "/v1/completions", json=asked) as answer:
                answer.raise_for_status()
                async for line in answer.aiter_lines():
                    if line.startswith("data: {"):
                        now = time.perf_counter()
                        gaps.append(now - last)
                        last = now
            phase.first.append(gaps[0])
            phase.gaps += gaps[1:NEW_TOKENS]
            await asyncio.sleep(self.rng.uniform(0.5, 1.5) * load.pause)

    @contextlib.asynccontextmanager
    async def _training_speed(self, http: httpx.AsyncClient, phase: Phase) -> AsyncIterator[None]:
        """Tokens trained per second meanwhile, between steps that are seen to end if there are a few."""
        seen: list[tuple[float, int]] = []

        async def watch() -> None:
            while True:
                answer = await http.get(f"/v1/fine_tuning/jobs/{self.job}")
                tokens = answer.raise_for_status().json()["progress"]["trained_tokens"]
                if not seen or tokens != seen[-1][1]:
                    seen.append((time.perf_counter(), tokens))
                await asyncio.sleep(POLL_SECONDS)

        watcher = asyncio.create_task(watch()) if phase.job else None
        yield
        if watcher:
            watcher.cancel()
            await asyncio.gather(watcher, return_exceptions=True)
            if len(seen) < FEW_STEPS:
                phase.trained.append((seen[-1][1] - seen[0][1]) / self.seconds)
            else:
                (began, first), (ended, last) = seen[1], seen[-1]
                phase.trained.append((last - first) / (ended - began))

    def _progress(self, http: httpx.Client) -> dict[str, Any]:
        progress: dict[str, Any] = http.get(f"/v1/fine_tuning/jobs/{self.job}").json()["progress"]
        return progress

    def _cpu(self) -> float:
        """Seconds of processor time that engine and API have had."""
        return sum(sum(other.cpu_times()[:2]) for other in self.others)


def table(figures: list[dict[str, Any]]) -> Table:
    shown = Table(
        "load", "job", "TPOT p50", "p99", "TTFT p50", "trained tokens/s", "of idle", "server's cores"
    )
    whole = next(own["trained_tokens_per_s"] for own in figures if own["load"] == "idle")
    for own in figures:
        times = (own.get(name) for name in ("tpot_p50_ms", "tpot_p99_ms", "ttft_p50_ms"))
        speed = own.get("trained_tokens_per_s")
        shown.add_row(
            own["load"],
            "yes" if own["job"] else "no",
            *("-" if t is None else f"{t:.1f} ms" for t in times),
            *(("-", "-") if speed is None else (f"{speed:.0f}", f"{speed / whole:.2f}")),
            f"{own['server_cores']:.2f}",
        )
    return shown


if __name__ == "__main__":
    typer.run(main)
