"""A server under traffic, over HTTP: throughput, latencies, objectives kept, adapters found on the device.

    python -m benchmarks.serving                         # less than four minutes
    python -m benchmarks.serving --rates 1,2,4 --seconds 60 --adapters 200 --api-processes 2

A real `polypeft serve` with SmolLM2-135M, and more adapters (LoRA r8 on q and v) than it has slots. Requests
come as in `traffic.py`, whether or not those before are done, and all are streamed. A time to first token
counts from the moment a request was due. Time per output token is a request's own mean after its first. The
objective is kept by a request that has both under their limits.
"""

import asyncio
import contextlib
import json
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, get_args

import httpx
import numpy as np
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from safetensors.torch import load_file, save_file

from benchmarks.support.arms import quiet
from benchmarks.support.machine import measure
from benchmarks.support.traffic import BURSTS, Arrivals, Ask, Text, texts_of, traffic
from server.base_model.default_model import ensure_default_model
from server.base_model.tokenizer import Tokenizer
from tests.e2e.serving import Serving, body, push
from tests.fixtures.models import make_lora

CACHE = Path(__file__).resolve().parents[1] / ".cache"
MODEL = "smollm2-135m-instruct"
LONGEST_SECONDS = 120.0
COUNTERS = {"hits": "polypeft_adapter_cache_hits_total", "misses": "polypeft_adapter_cache_misses_total"}
COLUMNS = {
    "tokens_per_s": ("tokens/s", "{:.0f}"),
    "ttft_p50_ms": ("TTFT p50, ms", "{:.0f}"),
    "ttft_p99_ms": ("p99", "{:.0f}"),
    "tpot_p50_ms": ("TPOT p50, ms", "{:.0f}"),
    "tpot_p99_ms": ("p99", "{:.0f}"),
    "objective_kept": ("objective", "{:.2f}"),
    "hit_rate": ("on the device", "{:.2f}"),
}
Figures = dict[str, Any]


@dataclass(frozen=True)
class Objective:
    first_ms: float
    token_ms: float


@dataclass(frozen=True)
class Served:
    """How a request went. Refused or cut: `first` is None, and `error` says how."""

    tokens: int
    first: float | None = None  # seconds from when it was due to its first token
    last: float = 0.0  # ... to its last
    error: str = ""

    @property
    def per_token(self) -> float:
        return 0.0 if self.first is None else (self.last - self.first) / (self.tokens - 1)

    def keeps(self, objective: Objective) -> bool:
        return (
            self.first is not None
            and 1000 * self.first <= objective.first_ms
            and 1000 * self.per_token <= objective.token_ms
        )


async def serve_one(http: httpx.AsyncClient, ask: Ask, start: float) -> Served:
    """Send it when it is due, and read its stream."""
    due = start + ask.at
    await asyncio.sleep(due - time.perf_counter())
    asked = body(f"a{ask.adapter}", ask.text.prompt, ask.text.tokens, stream=True)
    first = last = 0.0
    try:
        async with http.stream("POST", "/v1/completions", json=asked) as answer:
            if not answer.is_success:
                return Served(ask.text.tokens, error=(await answer.aread()).decode())
            async for line in answer.aiter_lines():
                if line.startswith('data: {"error"'):
                    return Served(ask.text.tokens, error=line)
                if line.startswith("data: {"):
                    last = time.perf_counter() - due
                    first = first or last
    except httpx.TransportError as error:
        return Served(ask.text.tokens, error=repr(error))
    return Served(ask.text.tokens, first, last)


async def phase(server: Serving, key: str, asks: list[Ask]) -> tuple[list[Served], float]:
    """All of them, to the last one's end; and how long that took."""
    headers = {"authorization": f"Bearer {key}"}
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=100)
    async with httpx.AsyncClient(
        base_url=server.url, headers=headers, timeout=LONGEST_SECONDS, limits=limits
    ) as http:
        start = time.perf_counter()
        served = await asyncio.gather(*(serve_one(http, ask, start) for ask in asks))
        return list(served), time.perf_counter() - start


def figures_of(served: Sequence[Served], seconds: float, objective: Objective) -> Figures:
    done = [one for one in served if one.first is not None]
    firsts = [1000 * one.first for one in done if one.first is not None]
    gaps = [1000 * one.per_token for one in done]
    return {
        "requests": len(served),
        "failed": Counter(one.error for one in served if one.error),
        "tokens_per_s": sum(one.tokens for one in done) / seconds,
        **{f"ttft_p{q}_ms": float(np.percentile(firsts, q)) for q in (50, 99)},
        **{f"tpot_p{q}_ms": float(np.percentile(gaps, q)) for q in (50, 99)},
        "objective_kept": sum(one.keeps(objective) for one in served) / len(served),
    }


def upload(server: Serving, key: str, model: Path, scratch: Path, count: int) -> None:
    """Adapters a0, a1, ...: one that PEFT saved, its numbers scaled a little differently each time.

    The most popular, a0, comes last: the device is then as if they had been asked for.
    """
    folder = make_lora(model, scratch / "lora", target_modules=["q_proj", "v_proj"], r=8, scale=0.02)
    weights = folder / "adapter_model.safetensors"
    first = load_file(weights)
    with server.http(key) as http:
        for i in track(range(count)[::-1], "uploading adapters", console=Console(stderr=True)):
            save_file({name: tensor * (1 + i / count) for name, tensor in first.items()}, weights)
            push(http, f"a{i}", folder)


@contextlib.contextmanager
def counted(server: Serving, into: Figures) -> Iterator[None]:
    """The share of rows whose adapter was on the device meanwhile."""

    def now() -> dict[str, float]:
        time.sleep(1.1)  # the engine tells once a second
        return {name: server.gauge(metric) for name, metric in COUNTERS.items()}

    before = now()
    yield
    grown = {name: value - before[name] for name, value in now().items()}
    into["hit_rate"] = grown["hits"] / max(sum(grown.values()), 1.0)


def main(
    rates: Annotated[str, typer.Option(help="Requests a second, with commas.")] = "2,4,6",
    seconds: Annotated[float, typer.Option(help="That requests of a phase come.")] = 20.0,
    adapters: int = 48,
    slots: int = 16,
    alpha: Annotated[float, typer.Option(help="Of the power law; 1 is uniform, 0.1 extreme.")] = 0.3,
    first_ms: Annotated[float, typer.Option(help="Objective: time to first token.")] = 1000.0,
    token_ms: Annotated[float, typer.Option(help="Objective: time per output token.")] = 150.0,
    api_processes: int = 1,
    output: Annotated[Path, typer.Option(help="Where the JSON goes; the plot beside it.")] = Path(
        "serving.json"
    ),
) -> None:
    """Measure, print a table, write JSON and a plot."""
    quiet()
    model = ensure_default_model(CACHE)
    machine = measure(2)
    objective = Objective(first_ms, token_ms)
    texts = texts_of(Tokenizer.load(model))
    phases: list[Figures] = []
    with tempfile.TemporaryDirectory(prefix="polypeft-serving-") as scratch:
        (Path(scratch) / "data").mkdir()
        (Path(scratch) / "data" / "models").symlink_to(CACHE / "models")
        options = ("--adapter-slots", str(slots), "--api-processes", str(api_processes), "--workers", "0")
        with Serving(MODEL, Path(scratch), *options) as server:
            key = server.tenant("benchmark")
            upload(server, key, model, Path(scratch), adapters)
            for kind in get_args(Arrivals):
                for rate in map(float, rates.split(",")):
                    found: Figures = {"arrivals": kind, "rate": rate}
                    asks = traffic(kind, rate, seconds, texts, adapters=adapters, alpha=alpha)
                    with counted(server, found):
                        served, took = asyncio.run(phase(server, key, asks))
                    phases.append(found | figures_of(served, took, objective))
    report = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": asdict(machine),
        "job": {
            "model": MODEL,
            "seconds": seconds,
            "adapters": adapters,
            "slots": slots,
            "alpha": alpha,
            "gamma_cv": BURSTS,
            "api_processes": api_processes,
            "answer_tokens": mean_tokens(texts),
            "objective": asdict(objective),
        },
        "phases": phases,
    }
    console = Console()
    console.print(table(phases))
    for error, count in sum((own["failed"] for own in phases), Counter[str]()).items():
        console.print(f"{count} failed: {error}", markup=False)
    output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    draw(phases, objective, output.with_suffix(".png"))


def mean_tokens(texts: list[Text]) -> float:
    return sum(text.tokens for text in texts) / len(texts)


def table(phases: list[Figures]) -> Table:
    shown = Table("arrivals", "requests/s", "failed")
    for title, _ in COLUMNS.values():
        shown.add_column(title, justify="right")
    for own in phases:
        cells = (form.format(own[key]) for key, (_, form) in COLUMNS.items())
        shown.add_row(
            own["arrivals"], f"{own['rate']:g}", f"{own['failed'].total()} of {own['requests']}", *cells
        )
    return shown


def draw(phases: list[Figures], objective: Objective, path: Path) -> None:
    """Four panels over the rate of requests, as PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6.5), layout="constrained")
    throughput, kept, first, token = figure.subplots(2, 2).flat
    colours = dict(zip(get_args(Arrivals), ("C0", "C1"), strict=True))
    panels = [
        (throughput, "new tokens per second", {"tokens_per_s": ("-", "")}),
        (kept, "share", {"objective_kept": ("-", " in the objective"), "hit_rate": (":", " on the device")}),
        (first, "time to first token, ms", {"ttft_p50_ms": ("-", " p50"), "ttft_p99_ms": ("--", " p99")}),
        (token, "time per output token, ms", {"tpot_p50_ms": ("-", " p50"), "tpot_p99_ms": ("--", " p99")}),
    ]
    for axes, label, lines in panels:
        for kind, colour in colours.items():
            own = [one for one in phases if one["arrivals"] == kind]
            for key, (style, suffix) in lines.items():
                points = [(one["rate"], one[key]) for one in own]
                axes.plot(
                    *zip(*points, strict=True), style, marker="o", color=colour, label=f"{kind}{suffix}"
                )
        axes.set(xlabel="requests per second", ylabel=label, xticks=[one["rate"] for one in phases])
        axes.grid(alpha=0.3)
    for axes, limit in ((first, objective.first_ms), (token, objective.token_ms)):
        axes.axhline(limit, color="grey", linewidth=0.8, label="objective")
    for axes in (throughput, kept, first, token):
        axes.set_ylim(0, 1.05 if axes is kept else None)
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    typer.run(main)
