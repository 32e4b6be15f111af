"""What HTTP, keys and the crossing between processes cost: of a request's time, and of a core.

    python -m benchmarks.http_overhead                   # about two minutes

`added`: the same requests, one at a time and in turns, to an engine in this process and through `polypeft
serve` with a tenant's key: one token (its whole time), and a stream (to its first token, and between tokens).
Both engines run on one thread each, so that the API has a core as it should. The text is the same each time
and the prefix cache is on: what differs is the way.

`relay`: one token of an engine that takes no time (server/engine/fake.py), and how many tokens a second one
API process streams when the engine is not the limit. Engine and clients are in this process.
"""

import asyncio
import http.client
import json
import statistics
import tempfile
import time
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.api_process.relay import relay
from benchmarks.support.arms import quiet
from benchmarks.support.machine import measure
from server.base_model.default_model import ensure_default_model
from server.base_model.tokenizer import Tokenizer
from server.engine.engine import Engine
from server.messages import Generate, Sampling
from server.settings import Settings
from tests.e2e.serving import Serving, body

CACHE = Path(__file__).resolve().parents[1] / ".cache"
MODEL = "smollm2-135m-instruct"
TEXT = "One frozen base model stays resident. Thousands of tenants bring small adapters of their own."
STREAM = 16  # tokens
OPTIONS = ("--threads", "1", "--lookup-tokens", "0", "--workers", "0")
ARMS = ("in process", "over HTTP")
Times = dict[str, list[float]]  # what was timed -> seconds


class InProcess:
    """The engine's own loop, called as its process calls it."""

    def __init__(self, model: Path, folder: Path) -> None:
        self.engine = Engine(Settings(data_dir=folder, threads=1, lookup_tokens=0), model)
        self.prompt = Tokenizer.load(model).encode(TEXT)
        self.count = 0

    def ask(self, tokens: int) -> list[float]:
        """When each token came, from the start."""
        self.count += 1
        sampling = Sampling(max_tokens=tokens, temperature=0.0, ignore_eos=True)
        start, came = time.perf_counter(), list[float]()
        self.engine.submit(Generate(str(self.count), "tenant", self.prompt, sampling))
        while self.engine.busy:
            came += [time.perf_counter() - start for chunk in self.engine.step() if chunk.tokens]
        return came


class OverHttp:
    """One connection that stays open, by the plainest client there is."""

    def __init__(self, server: Serving) -> None:
        address = urlsplit(server.url)
        self.connection = http.client.HTTPConnection(str(address.hostname), address.port)
        key = server.tenant("overhead")
        self.headers = {"authorization": f"Bearer {key}", "content-type": "application/json"}

    def ask(self, tokens: int) -> list[float]:
        asked = json.dumps(body(MODEL, TEXT, tokens, stream=tokens > 1))
        start, came = time.perf_counter(), list[float]()
        self.connection.request("POST", "/v1/completions", asked, self.headers)
        answer = self.connection.getresponse()
        if answer.status != http.client.OK:
            raise RuntimeError(answer.read().decode())
        if tokens == 1:
            answer.read()
            return [time.perf_counter() - start]
        while line := answer.readline():
            if line.startswith(b"data: {") and b'"finish_reason":null' in line:  # the last has no token
                came.append(time.perf_counter() - start)
        return came


def added(model: Path, scratch: Path, rounds: int) -> dict[str, Any]:
    """Medians of both arms, in milliseconds, and what the way over HTTP adds."""
    (scratch / "data").mkdir()
    (scratch / "data" / "models").symlink_to(CACHE / "models")
    with Serving(MODEL, scratch, *OPTIONS) as server:
        inside, outside = InProcess(model, scratch / "own"), OverHttp(server)
        asking = dict(zip(ARMS, (inside.ask, outside.ask), strict=True))
        times: dict[str, Times] = {arm: {} for arm in ARMS}
        for number in track(range(-2, rounds), "added", console=Console(stderr=True)):
            for arm in ARMS if number % 2 else ARMS[::-1]:
                (whole,), stream = asking[arm](1), asking[arm](STREAM)
                if number >= 0:
                    own = times[arm]
                    own.setdefault("one token", []).append(whole)
                    own.setdefault("first of a stream", []).append(stream[0])
                    gap = (stream[-1] - stream[0]) / (STREAM - 1)
                    own.setdefault("each further token", []).append(gap)
        inside.engine.close()
    p50 = {
        arm: {what: 1000 * statistics.median(seconds) for what, seconds in own.items()}
        for arm, own in times.items()
    }
    first, second = p50.values()
    return {
        what: dict(zip(ARMS, (ms, second[what]), strict=True)) | {"added": second[what] - ms}
        for what, ms in first.items()
    }


def main(
    rounds: int = 60,
    seconds: Annotated[float, typer.Option(help="Of each relay.")] = 8.0,
    streams: Annotated[str, typer.Option(help="Of the relay, at a time.")] = "4,16,64",
    output: Annotated[Path, typer.Option(help="Where the JSON goes.")] = Path("http_overhead.json"),
) -> None:
    """Measure, print two tables, write JSON."""
    quiet()
    model = ensure_default_model(CACHE)
    machine = measure(1)
    report: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": asdict(machine),
        "rounds": rounds,
        "stream_tokens": STREAM,
    }
    with tempfile.TemporaryDirectory(prefix="polypeft-http-") as scratch:
        counts = [int(count) for count in streams.split(",")] if streams else []
        report["relay"] = asyncio.run(relay(model, Path(scratch) / "relay", seconds, counts))
        report["added_ms"] = added(model, Path(scratch), rounds) if rounds else {}
    console, table = Console(), Table("p50, ms", *ARMS, "added")
    for what, cells in report["added_ms"].items():
        table.add_row(what, *(f"{cell:.2f}" for cell in cells.values()))
    console.print(table)
    table = Table("streams", "tokens/s relayed", "cores of the API", "tokens/s of one core", "us a token")
    for own in report["relay"]["streams"]:
        table.add_row(*(f"{value:.3g}" if value < 1000 else f"{value:.0f}" for value in own.values()))
    one_token_ms = report["relay"]["one_token_ms"]
    console.print(table, f"one token of an engine that takes no time: {one_token_ms:.2f} ms")
    output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
