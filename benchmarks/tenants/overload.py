"""Ten times what a server can do: what it still does, how it refuses, and how soon it is itself again.

    python -m benchmarks.tenants.overload                              # about four minutes
    python -m benchmarks.tenants.overload --seconds 15 --places 8

A real `polypeft serve` with SmolLM2-135M. The peak is what as many clients as there are places get, each
asking again when it has its answer. Then requests come at ten times that rate, whether or not those before
are done, of four tenants and each with a deadline; a tenth of the clients hang up. Goodput counts the tokens
of requests that ended well. /healthz and /metrics are read all the while. Then the load ends: recovery is the
time until no row runs or waits and a request is answered.
"""

import asyncio
import json
import re
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Annotated, Any

import httpx
import numpy as np
import typer
from rich.console import Console

from benchmarks.serving import CACHE, MODEL
from benchmarks.support.arms import quiet
from benchmarks.tenants.clients import Answer, Profile, ask, connected, crowd, tokens_between
from server.base_model.default_model import ensure_default_model
from tests.e2e.serving import Serving

TIMES = 10
TENANTS = 4
PROFILE = Profile()
EMPTY = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")
PROBES_PER_SECOND = 5
RECOVERY_SECONDS = 120.0


async def flood(url: str, keys: Sequence[str], rate: float, seconds: float, deadline: float) -> list[Answer]:
    """`rate` requests a second, and their answers."""
    rng, tasks = Random(0), list[asyncio.Task[Answer]]()
    async with asyncio.TaskGroup() as group:
        clients = [connected(url, key) for key in keys]
        opened = [await client.__aenter__() for client in clients]
        start = time.perf_counter()
        for number in range(int(rate * seconds)):
            await asyncio.sleep(start + number / rate - time.perf_counter())
            request = PROFILE.request(MODEL, number, rng)
            events = 3 if rng.random() < 0.1 else None
            work = ask(opened[number % len(opened)], request, events=events, deadline=deadline)
            tasks.append(group.create_task(work))
    for client in clients:
        await client.__aexit__(None, None, None)
    return [task.result() for task in tasks]


async def probe(url: str, path: str, until: asyncio.Event) -> list[float]:
    """Seconds that each look at `path` took, on a connection of its own as a probe has."""
    seconds = []
    while not until.is_set():
        start = time.perf_counter()
        async with httpx.AsyncClient(base_url=url, timeout=60) as http:
            (await http.get(path)).raise_for_status()
        seconds.append(time.perf_counter() - start)
        await asyncio.sleep(1 / PROBES_PER_SECOND)
    return seconds


async def gauges(http: httpx.AsyncClient) -> dict[str, float]:
    text = (await http.get("/metrics")).text
    return {
        name: float(re.findall(rf"^{re.escape(name)}\S* (\S+)$", text, re.MULTILINE)[0]) for name in EMPTY
    }


async def recovery(url: str, key: str) -> tuple[float, dict[str, float]]:
    """Seconds until a request is answered and nothing runs or waits; and what is left in the end."""
    start = time.perf_counter()
    async with connected(url, key) as http:
        while True:
            answer = await ask(http, PROFILE.request(MODEL, 0, Random(1)))
            left = await gauges(http)
            seconds = time.perf_counter() - start
            if (answer.done and not any(left.values())) or seconds > RECOVERY_SECONDS:
                return seconds, left
            await asyncio.sleep(0.2)


async def overload(
    url: str, keys: Sequence[str], places: int, seconds: float, deadline: float
) -> dict[str, Any]:
    groups = [(key, PROFILE, max(1, places // len(keys))) for key in keys]
    start = time.perf_counter()
    calm = [answer for group in await crowd(url, MODEL, groups, seconds / 2) for answer in group]
    peak = tokens_between(calm, start + seconds / 10, start + seconds / 2) / (0.4 * seconds)
    over = asyncio.Event()
    probes = [asyncio.create_task(probe(url, path, over)) for path in ("/healthz", "/metrics")]
    start = time.perf_counter()
    answers = await flood(url, keys, TIMES * peak / PROFILE.tokens, seconds, deadline)
    load_end = start + seconds
    over.set()
    health, metrics = [await task for task in probes]
    recovered, left = await recovery(url, keys[0])
    refused = [a.ended - a.sent for a in answers if a.status in {429, 503}]
    good = sum(tokens_between([a], start + seconds / 5, load_end) for a in answers if a.done and not a.code)
    return {
        "peak_tokens_per_s": peak,
        "requests": len(answers),
        "goodput_over_peak": good / (0.8 * seconds) / peak,
        "done": sum(answer.done and not answer.code for answer in answers),
        "by_status": Counter(f"{answer.status} {answer.code}".strip() for answer in answers),
        "refusal_p50_ms": percentile_ms(refused, 50),
        "refusal_p99_ms": percentile_ms(refused, 99),
        "healthz_p99_ms": percentile_ms(health, 99),
        "metrics_p99_ms": percentile_ms(metrics, 99),
        "recovery_s": recovered,
        "left": left,
    }


def percentile_ms(seconds: Sequence[float], q: float) -> float | None:
    """In milliseconds; None of nothing."""
    return 1000 * float(np.percentile(seconds, q)) if seconds else None


def main(
    seconds: Annotated[float, typer.Option(help="Of overload.")] = 60.0,
    places: Annotated[int, typer.Option(help="Rows in the batch.")] = 32,
    deadline: Annotated[float, typer.Option(help="X-Request-Timeout of each request.")] = 20.0,
    api_processes: int = 1,
    output: Annotated[Path, typer.Option(help="Where the JSON goes.")] = Path("overload.json"),
) -> None:
    """Measure, print, write JSON."""
    quiet()
    ensure_default_model(CACHE)
    with tempfile.TemporaryDirectory(prefix="polypeft-overload-") as scratch:
        (Path(scratch) / "data").mkdir()
        (Path(scratch) / "data" / "models").symlink_to(CACHE / "models")
        options = ("--max-seqs", str(places), "--api-processes", str(api_processes), "--workers", "0")
        with Serving(MODEL, Path(scratch), *options, "--lookup-tokens", "0") as server:
            keys = [server.tenant(f"t{i}") for i in range(TENANTS)]
            found = asyncio.run(overload(server.url, keys, places, seconds, deadline))
            Console().print_json(data=found)
            output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
